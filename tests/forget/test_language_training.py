"""What ULD's assistant and knowledge isolation train on: mixing, losses, the adaptive weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFiniteLoss
from palimpsest.forget.language.joint_loss import AdaptiveMultiplier, joint_loss
from palimpsest.forget.language.uld_data import assistant_loss, interleave, uniform_divergence
from palimpsest.parts.tokens import IGNORED, token_mean

# Mixing


@given(st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_interleaving_loses_nothing_keeps_the_order_and_spreads_evenly(first, second):
    one, two = [("a", i) for i in range(first)], [("b", i) for i in range(second)]
    found = interleave(one, two)
    assert [item for item in found if item[0] == "a"] == one
    assert [item for item in found if item[0] == "b"] == two
    fewer, more = sorted([first, second])
    rare = "a" if first <= second else "b"
    places = [at for at, item in enumerate(found) if item[0] == rare]
    if fewer:
        gaps = [b - a - 1 for a, b in zip(places, [*places[1:], len(found)], strict=True)]
        assert places[0] == 0 and {math.floor(more / fewer), math.ceil(more / fewer)} >= set(gaps)


@given(st.integers(1, 20), st.integers(1, 20))
@settings(deadline=None)
def test_as_released_the_share_is_rounded_and_the_end_may_be_missing(first, second):
    found = interleave(["a"] * first, ["b"] * second, as_released=True)
    fewer, more = sorted([first, second])
    share = round(more / fewer)
    rare, common = ("a", "b") if first <= second else ("b", "a")
    assert found.count(rare) == fewer and found.count(common) == min(more, fewer * share)


# The assistant


@pytest.fixture
def batch():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[IGNORED, IGNORED, 2, 4], [IGNORED, 1, 0, IGNORED], [IGNORED, 3, 3, 1]])
    return logits, labels, torch.tensor([False, True, False])


def test_the_assistant_remembers_one_kind_and_is_uniform_on_the_other(batch):
    logits, labels, retained = batch
    found = assistant_loss(logits, labels, retained, retain_weight=2.0)
    assert found.remember.item() == pytest.approx(token_mean(logits[~retained], labels[~retained]).item())
    uniform = torch.full((4, 5), 0.2)
    expected = F.kl_div(logits[1].log_softmax(-1), uniform, reduction="batchmean")
    assert found.uniform.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.total.item() == pytest.approx((found.remember + 2 * found.uniform).item())
    answers = assistant_loss(logits, labels, retained, scored_only=True).uniform
    by_hand = F.kl_div(logits[1, :2].log_softmax(-1), uniform[:2], reduction="batchmean")
    assert answers.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_missing_kind_adds_nothing(batch):
    logits, labels, _ = batch
    only_forget = assistant_loss(logits, labels, torch.zeros(3, dtype=torch.bool))
    only_retain = assistant_loss(logits, labels, torch.ones(3, dtype=torch.bool))
    assert only_forget.uniform.item() == 0 and only_retain.remember.item() == 0
    for found in (only_forget, only_retain):
        assert torch.isfinite(torch.autograd.grad(found.total, logits)[0]).all()


def test_uniform_logits_have_no_divergence_and_extreme_ones_a_finite_one():
    assert uniform_divergence(torch.full((2, 7), 3.0)).abs().max() <= 1e-6
    extreme = torch.tensor([[300.0, 0.0, -300.0]])
    assert uniform_divergence(extreme.bfloat16()).isfinite().all()


def test_flags_that_do_not_fit_and_a_negative_weight_are_refused(batch):
    logits, labels, retained = batch
    for flags in (retained[:2], retained.int()):
        with pytest.raises(ModelMismatch, match="flag"):
            assistant_loss(logits, labels, flags)
    with pytest.raises(InvalidHyperparameter, match="retain_weight"):
        assistant_loss(logits, labels, retained, -1.0)


# The adaptive weight


def test_the_baseline_is_the_mean_over_rows_of_the_first_epoch():
    adaptive = AdaptiveMultiplier()
    for number, (loss, rows) in enumerate([(1.0, 3), (2.0, 1), (0.5, 4)]):
        assert adaptive.update(loss, rows, epoch=number / 3) == 1.2
    assert adaptive.reference == pytest.approx((3 + 2 + 2) / 8)
    adaptive.update(9.0, 4, epoch=1.0)
    assert adaptive.reference == pytest.approx(7 / 8)


def test_the_official_baseline_is_too_small_by_the_rows_per_batch():
    mean, official = AdaptiveMultiplier(), AdaptiveMultiplier(baseline="official")
    for number in range(5):
        for each in (mean, official):
            each.update(1.5, 6, number / 5)
    assert mean.reference == pytest.approx(1.5) and official.reference == pytest.approx(1.5 / 6)
    assert mean.update(1.5, 6, 1.0) == 1.2 and official.update(1.5, 6, 1.0) == 2.3


@pytest.mark.parametrize(
    ("above", "weight"),
    [(-1.0, 1.2), (0.0, 1.2), (0.1, 1.2), (0.7, 1.9), (0.9, 2.3), (50.0, 2.3), (1e6, 2.3)],
)
def test_the_weight_follows_the_card_for_a_loss_above_the_baseline(above, weight):
    adaptive = AdaptiveMultiplier(reference=2.0)
    assert adaptive.update(2.0 + above, 4, epoch=3.2) == pytest.approx(weight)
    assert adaptive.change == pytest.approx(max(above, 0.0))


@given(st.floats(0, 3), st.floats(0, 3))
@settings(deadline=None)
def test_the_weight_never_falls_as_the_damage_grows(one, two):
    weights = [
        AdaptiveMultiplier(reference=0.5, high=2.8).update(loss, 2, 1.0) for loss in sorted((one, two))
    ]
    assert 1.2 <= weights[0] <= weights[1] <= 2.8


def test_a_batch_without_retained_rows_leaves_the_state_alone():
    adaptive = AdaptiveMultiplier()
    adaptive.update(1.0, 2, 0.0)
    assert adaptive.update(float("nan"), 0, 0.5) == 0.0
    assert (adaptive.rows, adaptive.reference) == (2, 1.0)


def test_the_joint_loss_takes_what_the_batch_has():
    forget, retain = torch.tensor(2.0), torch.tensor(0.5)
    assert joint_loss(forget, retain, 1.2).item() == pytest.approx(-1.4)
    assert joint_loss(forget, None, 0.0).item() == -2.0
    assert joint_loss(None, retain, 1.2).item() == pytest.approx(0.6)
    with pytest.raises(InvalidHyperparameter, match="forget or retained"):
        joint_loss(None, None, 1.0)


def test_settings_out_of_range_and_losses_that_are_not_finite_are_refused():
    for settings_, named in (
        ({"scale": 0.0}, "scale"),
        ({"base": 1.0}, "base"),
        ({"low": -1.0}, "low"),
        ({"high": 1.0}, "high"),
        ({"baseline": "median"}, "median"),
    ):
        with pytest.raises(InvalidHyperparameter, match=named):
            AdaptiveMultiplier(**settings_)
    with pytest.raises(NonFiniteLoss, match="nan"):
        AdaptiveMultiplier().update(float("nan"), 2, 0.0)
