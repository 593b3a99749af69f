"""Pseudo-labels: the original's best class among those kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.forget.measuring import accuracy
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidLabels, MissingNeed, ModelMismatch
from palimpsest.core.evidence import observe_all
from palimpsest.forget.classifier.pseudo_label import PseudoLabel, best_kept, pseudo_labels
from palimpsest.models import build_model

LABEL = 3


def logits_of(model: nn.Module, records: pal.Records) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(records.tensors["input"]).numpy()


@given(st.integers(0, 2**16), st.lists(st.integers(0, 5), max_size=4, unique=True))
def test_the_best_kept_class_is_found_by_search(seed, forgotten):
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    own = logits.argmin(1)
    for mask_own in (False, True):
        for row, found in enumerate(best_kept(logits, forgotten, own if mask_own else None).tolist()):
            banned = {*forgotten, *([int(own[row])] if mask_own else [])}
            assert found == max((c for c in range(6) if c not in banned), key=lambda c: float(logits[row, c]))


def test_a_kept_class_of_minus_infinity_is_still_a_class():
    logits = torch.tensor([[9.0, float("-inf"), float("-inf")]])
    assert best_kept(logits, [0, 1]).tolist() == [2]
    with pytest.raises(InvalidHyperparameter, match="no class"):
        best_kept(logits, [0, 1, 2])


def test_whole_classes_get_the_originals_second_guess(digits_model, class_request, digits_task):
    found = pseudo_labels(digits_model, class_request, digits_task, pal.Runtime())
    logits = logits_of(digits_model, class_request.forget)
    logits[:, LABEL] = -np.inf
    assert found == dict(zip(class_request.forget.ids, logits.argmax(1).tolist(), strict=True))


def test_random_records_lose_their_own_class_only(digits_model, random_request, digits_task):
    found = pseudo_labels(digits_model, random_request, digits_task, pal.Runtime())
    logits, own = logits_of(digits_model, random_request.forget), random_request.forget.column("label")
    logits[np.arange(len(own)), own] = -np.inf
    assert list(found.values()) == logits.argmax(1).tolist()
    with pytest.raises(InvalidHyperparameter, match="masked='own'"):
        pseudo_labels(digits_model, random_request, digits_task, pal.Runtime(), "forgotten")


def test_part_of_a_class_is_treated_as_records(digits, digits_model, digits_task):
    rule = pal.by_column("label", LABEL) & pal.by_fraction(0.5, seed=0)
    part = pal.split(digits, rule, test=0.2, holdout=0.2, seed=0)
    assert LABEL not in pseudo_labels(digits_model, part, digits_task, pal.Runtime()).values()


def test_without_retained_records_all_classes_of_the_request_are_masked(
    digits_model, class_request, digits_task
):
    alone = replace(class_request, retain=None)
    runtime = pal.Runtime()
    assert pseudo_labels(digits_model, alone, digits_task, runtime) == pseudo_labels(
        digits_model, class_request, digits_task, runtime
    )
    after = pal.forget(digits_model, alone, "pseudo-label", digits_task, epochs=1)
    same = pal.forget(digits_model, class_request, "pseudo-label", digits_task, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), same.parameters(), strict=True))


def test_a_class_is_forgotten_and_the_others_mostly_stay(digits_model, class_request, digits_task):
    after = pal.forget(digits_model, class_request, "pseudo-label", digits_task)
    assert accuracy(digits_model, class_request.forget) > 0.9
    assert accuracy(after, class_request.forget) < 0.05
    assert accuracy(after, class_request.retain) > accuracy(digits_model, class_request.retain) - 0.15


def test_one_epoch_is_descent_on_the_pseudo_labels_of_the_original(digits_model, class_request, digits_task):
    n = len(class_request.forget)
    settings = {"epochs": 2, "lr": 0.1, "batch_size": n, "optimizer": "sgd", "momentum": 0.0, "mode": "eval"}
    after = pal.forget(digits_model, class_request, "pseudo-label", digits_task, **settings)
    twin, inputs = copy.deepcopy(digits_model), class_request.forget.tensors["input"]
    first = torch.from_numpy(logits_of(digits_model, class_request.forget))
    first[:, LABEL] = float("-inf")
    target = first.argmax(1)
    for _ in range(2):
        loss = nn.functional.cross_entropy(twin(inputs), target)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for a, b in zip(after.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_second_run_starts_from_its_own_original(class_request, digits_task):
    models = [build_model("small_cnn", (1, 8, 8), 10, seed=seed) for seed in (0, 1)]
    labels = [pseudo_labels(model, class_request, digits_task, pal.Runtime()) for model in models]
    assert labels[0] != labels[1]
    assert pseudo_labels(models[0], class_request, digits_task, pal.Runtime()) == labels[0]


def test_retained_records_are_not_read_and_the_model_stays(digits_model, class_request, digits_task):
    before = copy.deepcopy(digits_model.state_dict())
    kept = class_request.retain
    spoiled = pal.Records(
        TensorDataset(torch.zeros_like(kept.tensors["input"]), kept.tensors["label"]), ids=kept.ids
    )
    request = pal.ForgetSplit(class_request.forget, spoiled)
    after = pal.forget(digits_model, request, "pseudo-label", digits_task, epochs=1)
    same = pal.forget(digits_model, class_request, "pseudo-label", digits_task, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(before[k], v) for k, v in digits_model.state_dict().items())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_statistics_move_in_training_mode_only(mode, class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0, width=4)
    after = pal.forget(model, class_request, "pseudo-label", digits_task, epochs=1, mode=mode)
    same = [torch.equal(a, b) for a, b in zip(model.buffers(), after.buffers(), strict=True)]
    assert all(same) == (mode == "eval") and not after.training


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_large_vision_models_take_one_step(name, digits_task):
    settings = {"img_size": 32} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 4, seed=0, **settings).eval()
    random = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(12, 3, 32, 32, generator=random), torch.arange(12) % 4)
    request = pal.split(pal.Records(data), pal.by_column("label", LABEL), test=0.0, holdout=0.0)
    labels = pseudo_labels(model, request, digits_task, pal.Runtime())
    after = pal.forget(model, request, "pseudo-label", digits_task, epochs=1, lr=1e-4, mode="eval")

    def loss(one: nn.Module) -> float:
        seen = observe_all(one, request.forget, digits_task, pal.Runtime()).logits
        return float(nn.functional.cross_entropy(seen, torch.tensor(list(labels.values()))))

    assert loss(after) < loss(model)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"masked": "none"}, "none"),
        ({"mode": "frozen"}, "frozen"),
        ({"lr": 0.0}, "lr"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_settings_out_of_range_are_refused(setting, named):
    with pytest.raises(InvalidHyperparameter, match=named):
        PseudoLabel(**setting)


def test_bad_input_is_refused_before_any_work(digits_model, class_request, digits_task):
    two = pal.split(
        pal.Records(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)),
        pal.by_column("label", 1), test=0.0, holdout=0.0,
    )  # fmt: skip
    narrow = build_model("mlp", (1, 8, 8), 2)
    with pytest.raises(InvalidHyperparameter, match="no class"):
        pal.forget(narrow, replace(two, forget=two.train, retain=None), "pseudo-label", digits_task)
    with pytest.raises(InvalidLabels, match="0 to 2"):
        pal.forget(build_model("mlp", (1, 8, 8), 3), class_request, "pseudo-label", digits_task)
    with pytest.raises(InvalidLabels, match="0 to 2"):
        pseudo_labels(build_model("mlp", (1, 8, 8), 3), class_request, digits_task, pal.Runtime())
    unlabelled = pal.ForgetSplit(pal.Records(TensorDataset(torch.rand(4, 1, 8, 8))))
    with pytest.raises(MissingNeed, match="forget-labels"):
        pal.forget(digits_model, unlabelled, "pseudo-label", digits_task)
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        pal.forget(frozen, class_request, "pseudo-label", digits_task)
