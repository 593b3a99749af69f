from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import palimpsest as pal
from palimpsest.core.evidence import Evidence, observe_all
from palimpsest.models import build_model


class Scans(Dataset):
    """Items as dicts under names of their own, with numpy inputs; no `targets`."""

    def __init__(self, n: int = 30):
        self.pixels = np.random.default_rng(0).normal(size=(n, 1, 8, 8)).astype(np.float32)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, item):
        return {"scan": self.pixels[item], "diagnosis": item % 3}


class Answer(nn.Module):
    """A model that answers with an object, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.inner = build_model("mlp", (1, 8, 8), 3, seed=0)

    def forward(self, scan):
        return SimpleNamespace(logits=self.inner(scan))


def test_fields_under_other_names_and_models_that_answer_with_objects_work():
    task = pal.tasks.Classification(input="scan", label="diagnosis")
    parts = pal.split(pal.Records(Scans()), pal.by_fraction(0.3))
    model = pal.train(Answer(), parts.train, task, epochs=1)
    evidence = Evidence(model, parts, task)
    assert evidence.observe("unlearned", "forget").logits.shape == (len(parts.forget), 3)
    expected = [int(i) % 3 for i in parts.forget.ids]
    assert evidence.labels("forget").tolist() == expected


def test_named_layers_and_head_are_the_ones_observed(digits_model, class_request):
    task = pal.tasks.Classification(head="fc", layers=("conv2",))
    seen = observe_all(digits_model, class_request.holdout, task, pal.Runtime())
    assert list(seen.layers) == ["conv2"] and seen.features.shape[1] == digits_model.fc.in_features


def test_the_loss_is_cross_entropy_in_nats(digits_task):
    logits, batch = torch.zeros(2, 4), {"label": torch.tensor([1, 3])}
    assert torch.allclose(digits_task.loss_of_logits(logits, batch), torch.full((2,), np.log(4.0)).float())
