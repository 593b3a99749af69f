from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.forget.measuring import accuracy, changed, fingerprint, kept_and_gone, tensors_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.forget.classifier.boundary_expand import add_neuron, drop_neuron, linear_head
from palimpsest.models import build_model


class Averaging(nn.Module):
    """Logits from a convolution, no linear layer anywhere."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_the_old_rows_are_kept_and_the_new_one_is_drawn_as_torch_draws_linear_layers():
    head = nn.Linear(50, 3)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    torch.manual_seed(5)
    add_neuron(head)
    torch.manual_seed(5)
    fresh = nn.Linear(50, 1)
    assert head.out_features == 4 and head(torch.zeros(2, 50)).shape == (2, 4)
    assert torch.equal(head.weight, torch.cat([weight, fresh.weight]))
    assert torch.equal(head.bias, torch.cat([bias, fresh.bias]))
    drop_neuron(head)
    assert torch.equal(head.weight, weight) and torch.equal(head.bias, bias) and head.out_features == 3


def test_a_head_without_bias_gets_none():
    head = nn.Linear(4, 2, bias=False)
    add_neuron(head)
    assert head.bias is None and head.weight.shape == (3, 4)


def test_one_step_is_descent_towards_the_extra_class(digits_task):
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    records = pal.Records(TensorDataset(x, torch.arange(6) % 2))
    request = pal.ForgetSplit(records.select(range(4)), records.select([4, 5]))
    model = nn.Linear(3, 2)
    wide = pal.forget(
        model, request, "boundary-expand", digits_task,
        epochs=1, optimizer="sgd", momentum=0.0, lr=0.1, keep_neuron=True,
    )  # fmt: skip
    expected = nn.Linear(3, 3)
    with pal.Runtime(seed=0).seeded("boundary expand"):
        fresh = nn.Linear(3, 1)
    expected.load_state_dict(
        {"weight": torch.cat([model.weight, fresh.weight]), "bias": torch.cat([model.bias, fresh.bias])}
    )
    F.cross_entropy(expected(x[:4]), torch.full((4,), 2)).backward()
    assert torch.allclose(wide.weight, expected.weight - 0.1 * expected.weight.grad, atol=1e-6)
    narrow = pal.forget(
        model, request, "boundary-expand", digits_task, epochs=1, optimizer="sgd", momentum=0.0, lr=0.1
    )
    assert torch.equal(narrow.weight, wide.weight[:2]) and torch.equal(narrow.bias, wide.bias[:2])


def test_a_class_is_forgotten_at_a_price_above_that_of_boundary_shrink(
    digits_model, class_request, digits_task
):
    kept, gone = [], []
    for seed in range(3):
        unlearned = pal.forget(digits_model, class_request, "boundary-expand", digits_task, seed=seed)
        shrunk = pal.forget(digits_model, class_request, "boundary-shrink", digits_task, seed=seed)
        found = kept_and_gone(unlearned, class_request)
        kept.append(kept_and_gone(shrunk, class_request)[0] - found[0])
        gone.append(found[1])
    assert max(gone) <= 0.1  # measured 0.0
    assert sum(kept) > 0


def test_the_neuron_can_stay_and_takes_the_forget_records(digits_model, class_request, digits_task):
    wide = pal.forget(digits_model, class_request, "boundary-expand", digits_task, keep_neuron=True)
    with torch.no_grad():
        answers = wide(tensors_of(class_request.forget)["input"]).argmax(1)
    assert wide.head.out_features == 11 and (answers == 10).float().mean() >= 0.9
    dropped = pal.forget(digits_model, class_request, "boundary-expand", digits_task)
    assert dropped.head.out_features == 10 and dropped.head.weight.shape == (10, 64)


def test_neither_labels_nor_retained_records_are_used(digits_model, class_request, digits_task):
    tensors = tensors_of(class_request.forget)
    wrong = pal.Records(
        TensorDataset(tensors["input"], (tensors["label"] + 1) % 10), ids=class_request.forget.ids
    )
    runs = [
        pal.forget(digits_model, pal.ForgetSplit(part), "boundary-expand", digits_task, epochs=1)
        for part in (class_request.forget, wrong)
    ]
    assert fingerprint(runs[0]) == fingerprint(runs[1])
    assert any(moved.any() for moved in changed(digits_model, runs[0]).values())


def test_the_same_seed_gives_the_same_bytes_and_the_original_stays(digits_model, class_request, digits_task):
    before = fingerprint(digits_model)
    runs = [
        fingerprint(
            pal.forget(digits_model, class_request, "boundary-expand", digits_task, seed=seed, epochs=1)
        )
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert fingerprint(digits_model) == before and digits_model.head.out_features == 10


def test_frozen_layers_and_the_flag_of_a_frozen_head_stay(digits_model, class_request, digits_task):
    partly = copy.deepcopy(digits_model)
    partly.head.requires_grad_(False)
    partly.conv1.requires_grad_(False)
    unlearned = pal.forget(partly, class_request, "boundary-expand", digits_task, epochs=1)
    moved = changed(partly, unlearned)
    assert not moved["head.weight"].any() and not moved["conv1.weight"].any() and moved["fc.weight"].any()
    assert not unlearned.head.weight.requires_grad and not unlearned.head.bias.requires_grad


def test_part_of_a_class_and_random_records_lose_more_of_the_forgotten_than_of_the_rest(
    digits, digits_model, digits_task
):
    part = pal.by_column("label", 3) & pal.by_fraction(0.5, seed=0)
    request = pal.split(digits, part, test=0.2, holdout=0.2, seed=0)
    unlearned = pal.forget(digits_model, request, "boundary-expand", digits_task)
    assert accuracy(unlearned, request.forget) <= accuracy(unlearned, request.retain) - 0.3


def test_a_model_without_a_linear_head_is_refused(class_request, digits_task):
    with pytest.raises(ModelMismatch, match="linear layer of 10 outputs"):
        pal.forget(Averaging(), class_request, "boundary-expand", digits_task)
    headless = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.Unflatten(1, (10, 2)), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )
    with pytest.raises(ModelMismatch, match="10 outputs"):
        pal.forget(headless, class_request, "boundary-expand", digits_task)


def test_the_head_is_the_last_linear_layer_that_runs(class_request, digits_task):
    class Backwards(nn.Module):
        """Defines its head first."""

        def __init__(self):
            super().__init__()
            self.top, self.bottom = nn.Linear(8, 10), nn.Linear(64, 8)

        def forward(self, x):
            return self.top(self.bottom(x.flatten(1)).relu())

    model = Backwards()
    batch = class_request.forget.batch([0], digits_task.collate)
    assert linear_head(model, batch, digits_task) is model.top


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"lr": 0.0}, {"batch_size": 0}, {"optimizer": "lion"}])
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "boundary-expand", digits_task, **setting)


def test_a_frozen_model_is_refused(digits_model, class_request, digits_task):
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        pal.forget(frozen, class_request, "boundary-expand", digits_task)


def test_batch_norm_of_the_original_stays(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, width=4)
    before = fingerprint(model)
    few = replace(class_request, forget=class_request.forget.select(range(20)))
    unlearned = pal.forget(model, few, "boundary-expand", digits_task, epochs=1)
    assert fingerprint(model) == before and not any(module.training for module in unlearned.modules())
