from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.forget.measuring import accuracy, kept_and_gone
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.forget.classifier.l1_sparse import absolute_sum, penalty_weight
from palimpsest.models import build_model


def size(model):
    return sum(float(parameter.detach().abs().sum()) for parameter in model.parameters())


def test_the_penalty_falls_in_a_straight_line_and_ends_before_the_plain_epochs():
    assert [penalty_weight(epoch, 10, 0, 1.0) for epoch in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert [penalty_weight(epoch, 6, 2, 0.2) for epoch in range(6)] == pytest.approx(
        [0.2, 0.15, 0.1, 0.05, 0, 0]
    )
    assert penalty_weight(0, 3, 3, 1.0) == 0


def test_every_parameter_is_penalised_batch_norm_and_biases_too():
    model = build_model("small_resnet", (1, 8, 8), 10, width=2)
    absolute_sum(model).backward()
    assert absolute_sum(model).item() == pytest.approx(size(model), rel=1e-5)
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, parameter.detach().sign())


def test_one_step_is_gradient_descent_on_cross_entropy_plus_the_penalty(digits_task):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 3, generator=generator), torch.arange(8) % 2
    records = pal.Records(TensorDataset(x, y))
    request = pal.ForgetSplit(records.select([0]), records.select(range(1, 8)))
    model = nn.Linear(3, 2)
    unlearned = pal.forget(
        model, request, "l1-sparse", digits_task,
        epochs=1, batch_size=7, alpha=0.1, lr=0.5, momentum=0.0, weight_decay=0.0,
    )  # fmt: skip
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x[1:]), y[1:]).backward()
    for before, after in zip(plain.parameters(), unlearned.parameters(), strict=True):
        expected = before - 0.5 * (before.grad + 0.1 * before.detach().sign())
        assert torch.allclose(after, expected, atol=1e-6)


def test_weights_become_at_least_a_twentieth_smaller_than_by_fine_tuning(
    digits_model, class_request, digits_task
):
    same = {"lr": 0.01, "epochs": 10, "momentum": 0.9, "weight_decay": 5e-4}
    plain = pal.forget(digits_model, class_request, "finetune", digits_task, **same)
    sparse = pal.forget(digits_model, class_request, "l1-sparse", digits_task, alpha=1e-3, **same)
    assert size(sparse) <= 0.95 * size(plain)
    kept, gone = kept_and_gone(sparse, class_request)
    assert kept >= 0.93 and gone <= kept_and_gone(plain, class_request)[1]


def test_without_penalty_it_is_fine_tuning(digits_model, class_request, digits_task):
    same = {"lr": 0.01, "epochs": 1, "momentum": 0.9}
    few = replace(class_request, retain=class_request.retain.select(range(64)))  # one batch, so one order
    plain = pal.forget(digits_model, few, "finetune", digits_task, **same)
    for settings in ({"alpha": 0.0}, {"plain_epochs": 1}):
        sparse = pal.forget(digits_model, few, "l1-sparse", digits_task, **same, **settings)
        for one, other in zip(plain.parameters(), sparse.parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_forget_records_are_not_read(digits_model, class_request, digits_task):
    """The result is the same whatever they hold."""
    other = class_request.forget.select(range(5))
    runs = [
        pal.forget(digits_model, replace(class_request, forget=part), "l1-sparse", digits_task, epochs=1)
        for part in (class_request.forget, other)
    ]
    for one, two in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(one, two)
    assert accuracy(runs[0], class_request.retain) >= 0.9


@pytest.mark.parametrize(
    "setting", [{"alpha": -1e-4}, {"alpha": float("nan")}, {"plain_epochs": 11}, {"plain_epochs": -1}]
)
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "l1-sparse", digits_task, **setting)
