from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.forget.measuring import accuracy, changed, fingerprint, kept_and_gone
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch, UnknownName
from palimpsest.forget.classifier.cf_k import warm_restart
from palimpsest.models import build_model


def moved_layers(before, after):
    return {name.partition(".")[0] for name, mask in changed(before, after).items() if mask.any()}


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, {"head"}), (2, {"head", "fc"}), (3, {"head", "fc", "conv2"}), (4, {"head", "fc", "conv2", "conv1"})],
)
def test_the_last_k_layers_move_and_all_before_stay_bit_by_bit(
    k, expected, digits_model, class_request, digits_task
):
    unlearned = pal.forget(digits_model, class_request, "cf-k", digits_task, k=k, epochs=1)
    assert moved_layers(digits_model, unlearned) == expected
    assert all(parameter.requires_grad for parameter in unlearned.parameters())


def test_frozen_batch_norm_layers_keep_their_statistics_and_those_on_the_way_do_not(
    class_request, digits_task
):
    model = build_model("small_resnet", (1, 8, 8), 10, width=4)
    before = copy.deepcopy(model.state_dict())
    after = pal.forget(model, class_request, "cf-k", digits_task, k=3, epochs=1).state_dict()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    last_block = {name for name in before if name.startswith(("head.", "blocks.2."))}
    assert differ <= last_block
    # backwards: head, batch norm and convolution of the shortcut, then the block's second norm and convolution
    assert {"blocks.2.shortcut.1.running_mean", "blocks.2.norm2.running_mean"} <= differ
    assert not any(name.startswith(("blocks.2.norm1", "blocks.2.conv1")) for name in differ)


def test_weight_decay_and_momentum_do_not_move_frozen_layers(digits_model, class_request, digits_task):
    unlearned = pal.forget(
        digits_model, class_request, "cf-k", digits_task, epochs=2, momentum=0.9, weight_decay=0.5
    )
    assert moved_layers(digits_model, unlearned) == {"head"}


def test_one_step_of_all_layers_is_gradient_descent_on_cross_entropy(digits_task):
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 2
    records = pal.Records(TensorDataset(x, y))
    request = pal.ForgetSplit(records.select([0]), records.select(range(1, 8)))
    model = nn.Linear(3, 2)
    unlearned = pal.forget(
        model, request, "cf-k", digits_task, epochs=1, batch_size=7, lr=0.2, momentum=0.0, weight_decay=0.0
    )
    F.cross_entropy(model(x[1:]), y[1:]).backward()
    assert torch.allclose(unlearned.weight, model.weight - 0.2 * model.weight.grad, atol=1e-6)


def test_the_learning_rate_restarts_after_1_3_7_and_15_epochs():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1, 2, 0.005)
    for step in range(16 * 4):
        schedule.step(step / 4)
        assert warm_restart(step / 4, 0.1, 0.005) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert [warm_restart(epoch, 0.1, 0.005) for epoch in (0, 1, 3, 7, 15)] == pytest.approx([0.1] * 5)
    assert warm_restart(2, 0.1, 0.005) == pytest.approx(0.005 + 0.095 * (1 + math.cos(math.pi / 2)) / 2)


def test_named_layers_are_trained_instead(digits_model, class_request, digits_task):
    settings = {"epochs": 1, "schedule": "constant", "lr": 0.01}
    unlearned = pal.forget(
        digits_model, class_request, "cf-k", digits_task, layers=("conv2", "*.bias"), **settings
    )
    moved = {name for name, mask in changed(digits_model, unlearned).items() if mask.any()}
    assert moved == {"conv1.bias", "conv2.weight", "conv2.bias", "fc.bias", "head.bias"}


def test_a_class_leaves_the_outputs_and_the_rest_stays_known(digits_model, class_request, digits_task):
    for seed in range(2):
        unlearned = pal.forget(digits_model, class_request, "cf-k", digits_task, seed=seed)
        kept, gone = kept_and_gone(unlearned, class_request)
        assert kept >= 0.93 and gone <= 0.5  # measured gone: 0.0


def test_random_records_are_still_known_as_after_retraining(digits_model, random_request, digits_task):
    unlearned = pal.forget(digits_model, random_request, "cf-k", digits_task)
    assert accuracy(unlearned, random_request.forget) >= 0.85


def test_forget_records_are_not_read(digits_model, class_request, digits_task):
    runs = [
        fingerprint(
            pal.forget(digits_model, replace(class_request, forget=part), "cf-k", digits_task, epochs=1)
        )
        for part in (class_request.forget, class_request.forget.select([0]))
    ]
    assert runs[0] == runs[1]


def test_the_same_seed_gives_the_same_bytes_and_the_original_stays(digits_model, class_request, digits_task):
    before = fingerprint(digits_model)
    runs = [
        fingerprint(pal.forget(digits_model, class_request, "cf-k", digits_task, seed=seed, epochs=1))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2] and fingerprint(digits_model) == before


@pytest.mark.parametrize(
    "setting",
    [{"k": 0}, {"k": 5}, {"lowest_lr": -1.0}, {"schedule": "cosine"}, {"epochs": 0}, {"lr": 0.0}],
    ids=str,
)
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "cf-k", digits_task, **setting)


def test_what_is_missing_is_said(digits_model, class_request, digits_task):
    with pytest.raises(MissingNeed, match="retain-data"):
        pal.forget(digits_model, pal.ForgetSplit(class_request.forget), "cf-k", digits_task)
    with pytest.raises(UnknownName, match="conv2"):
        pal.forget(digits_model, class_request, "cf-k", digits_task, layers=("conv3",))
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        pal.forget(frozen, class_request, "cf-k", digits_task)
