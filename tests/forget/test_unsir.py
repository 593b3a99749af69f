from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.forget.measuring import fingerprint, kept_and_gone
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    AbsentClass,
    InvalidHyperparameter,
    InvalidRecords,
    MissingNeed,
    ModelMismatch,
)
from palimpsest.forget.classifier.unsir import UNSIR, noise_loss, sample_per_class
from palimpsest.models import build_model

SEEN: list[tuple[bool, torch.Tensor, list[str]]] = []


class Watching(pal.tasks.Classification):
    """Classification that notes the label and names of every batch that weights were trained on."""

    def loss_of_logits(self, logits, batch):
        if logits.requires_grad:
            SEEN.append((True, batch["label"].clone(), list(batch["id"])))
        return super().loss_of_logits(logits, batch)


def test_the_noise_loss_is_minus_cross_entropy_plus_the_mean_squared_length():
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(4, 3, generator=generator), torch.randn(4, 1, 2, 2, generator=generator)
    by_hand = [
        -F.cross_entropy(logits[i], torch.tensor(2)).item() + 0.1 * (noise[i] ** 2).sum().item()
        for i in range(4)
    ]
    assert noise_loss(logits, noise, 2, 0.1).item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_the_noise_is_what_the_model_denies_to_be_the_class(digits_model, class_request, digits_task):
    noise = UNSIR()._learn_noise(digits_model, class_request.retain, 3, digits_task, pal.Runtime())
    start = torch.randn(noise.shape, generator=pal.Runtime().generator("unsir noise", 3))
    with torch.no_grad():
        before, after = (
            F.cross_entropy(digits_model(x), torch.full((32,), 3)).item() for x in (start, noise)
        )
    assert noise.shape == (32, 1, 8, 8) and after > before + 1


def test_a_class_is_forgotten_and_the_rest_kept(digits_model, class_request, digits_task):
    for seed in range(3):  # measured: 0.00 to 0.03 of the class, 0.95 of the rest
        unlearned = pal.forget(digits_model, class_request, "unsir", digits_task, seed=seed)
        kept, gone = kept_and_gone(unlearned, class_request)
        assert gone <= 0.3 and kept >= 0.9


def test_records_of_the_class_are_never_read(digits_model, class_request, digits_task):
    """Whatever they hold, the result is the same."""
    noise = torch.rand(len(class_request.forget), 1, 8, 8)
    other = pal.Records(TensorDataset(noise, torch.full((len(noise),), 3)), ids=class_request.forget.ids)
    runs = [
        fingerprint(pal.forget(digits_model, replace(class_request, forget=part), "unsir", digits_task))
        for part in (class_request.forget, other)
    ]
    assert runs[0] == runs[1]


def test_noise_is_labelled_as_the_class_occurs_as_often_as_asked_and_is_not_repaired_with(
    digits_model, class_request
):
    SEEN.clear()
    settings = {"copies": 3, "noise_count": 5, "retain_per_class": 4, "noise_steps": 2}
    pal.forget(digits_model, class_request, "unsir", Watching(), **settings)
    labels = [
        (name, int(label)) for _, batch, names in SEEN for name, label in zip(names, batch, strict=True)
    ]
    assert [label for name, label in labels if name == "noise"] == [3] * 15
    counts = {name: sum(other == name for other, _ in labels) for name, _ in labels if name != "noise"}
    assert len(counts) == 36 and set(counts.values()) == {2}  # once to impair and once to repair
    assert "noise" not in SEEN[-1][2] and len(SEEN[-1][2]) == 36


def test_the_sample_has_the_same_number_of_every_class_that_stays(class_request, digits_task):
    sample = sample_per_class(class_request.retain, [3, 4], 7, digits_task, pal.Runtime())
    values, counts = np.unique(sample.column("label"), return_counts=True)
    assert values.tolist() == [0, 1, 2, 5, 6, 7, 8, 9] and set(counts) == {7}
    everything = sample_per_class(class_request.retain, [3], 10_000, digits_task, pal.Runtime())
    assert everything.ids == class_request.retain.ids


def test_two_classes_go_at_once(digits, digits_model, digits_task):
    request = pal.split(digits, pal.by_column("label", 3, 5), test=0.2, holdout=0.2, seed=0)
    kept, gone = kept_and_gone(pal.forget(digits_model, request, "unsir", digits_task), request)
    assert gone <= 0.4 and kept >= 0.85


def test_a_class_can_be_named_where_no_record_of_it_is_left(digits_model, class_request, digits_task):
    """Any record may stand for the request; none of the class is among them."""
    request = pal.ForgetSplit(class_request.retain.select([0]), class_request.retain.select(range(1, 900)))
    unlearned = pal.forget(digits_model, request, "unsir", digits_task, classes=(3,))
    assert kept_and_gone(unlearned, class_request)[1] <= 0.3


def test_requests_that_are_no_whole_classes_are_refused(digits, digits_model, random_request, digits_task):
    part = pal.by_column("label", 3) & pal.by_fraction(0.5, seed=0)
    both = pal.by_column("label", 5) | part
    for request in (
        random_request,
        pal.split(digits, part, test=0.2, holdout=0.2, seed=0),
        pal.split(digits, both, test=0.2, holdout=0.2, seed=0),
    ):
        with pytest.raises(MissingNeed, match="whole classes"):
            pal.forget(digits_model, request, "unsir", digits_task)


def test_running_statistics_come_from_training_and_not_from_learning_noise(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, width=4)
    before = fingerprint(model)
    UNSIR()._learn_noise(model, class_request.retain, 3, digits_task, pal.Runtime())
    assert fingerprint(model) == before and all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_bytes_and_the_original_stays(digits_model, class_request, digits_task):
    before = fingerprint(digits_model)
    settings = {"copies": 1, "retain_per_class": 10}
    runs = [
        fingerprint(pal.forget(digits_model, class_request, "unsir", digits_task, seed=seed, **settings))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2] and fingerprint(digits_model) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"noise_count": 0}, {"noise_steps": 0}, {"copies": 0}, {"retain_per_class": 0}, {"noise_lr": 0.0},
        {"noise_penalty": -1.0}, {"classes": ()}, {"impair_lr": 0.0}, {"repair_epochs": 0}, {"optimizer": "lion"},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "unsir", digits_task, **setting)


def test_what_is_missing_or_does_not_fit_is_said(digits_model, class_request, digits_task):
    with pytest.raises(AbsentClass, match="0 to 9"):
        pal.forget(digits_model, class_request, "unsir", digits_task, classes=(10,))
    with pytest.raises(MissingNeed, match="retain-data"):
        pal.forget(digits_model, pal.ForgetSplit(class_request.forget), "unsir", digits_task, classes=(3,))
    with pytest.raises(InvalidRecords, match="All retained"):
        pal.forget(digits_model, class_request, "unsir", digits_task, classes=tuple(range(10)))
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        pal.forget(frozen, class_request, "unsir", digits_task)
    words = pal.Records(TensorDataset(torch.arange(40) % 6, torch.arange(40) % 2))
    request = pal.split(words, pal.by_column("label", 1), test=0.0, holdout=0.0)
    with pytest.raises(InvalidRecords, match="floating-point"):
        pal.forget(nn.Embedding(6, 2), request, "unsir", digits_task)
