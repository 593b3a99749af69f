from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.parts.logit_combination import (
    eligible,
    logit_difference,
    offset_logits,
    relative_top_threshold,
    whp_logits,
)

rows = st.lists(st.floats(-20, 20).map(lambda x: round(x, 3)), min_size=2, max_size=30)


@given(rows, st.floats(0.01, 1))
@settings(deadline=None)
def test_the_filter_keeps_the_likeliest_tokens_and_at_least_k(row, rho):
    logits = torch.tensor(row, dtype=torch.float64)
    kept = eligible(logits, rho)
    assert int(kept.sum()) >= max(1, int(rho * len(row)))
    assert kept[logits.argmax()]
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()
    likely = logits.softmax(0) > rho * logits.softmax(0).max() * (1 + 1e-9)
    assert kept[likely].all()


def test_a_small_vocabulary_switches_the_released_filter_off():
    logits = torch.tensor([[0.0, 8.0, -3.0, 1.0]])
    assert eligible(logits, 0.1).tolist() == [[False, True, False, False]]
    assert eligible(logits, 0.1, as_released=True).all()
    threshold = relative_top_threshold(logits, 0.1)
    assert threshold.item() == pytest.approx(logits.log_softmax(-1).max().item() + math.log(0.1))
    large = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(eligible(large, 0.1), eligible(large, 0.1, as_released=True))


def test_a_difference_of_nothing_is_the_target_and_filtered_tokens_are_kept_or_excluded():
    generator = torch.Generator().manual_seed(0)
    target, assistant = torch.randn(2, 3, 4, 12, generator=generator) * 3
    assert torch.equal(logit_difference(target, assistant, 0.0), target)
    assert torch.equal(logit_difference(target, assistant, 0.0, 0.2), target)
    inside = eligible(target, 0.2)
    to_score = logit_difference(target, assistant, 0.8, 0.2)
    to_generate = logit_difference(target, assistant, 0.8, 0.2, "exclude")
    for combined in (to_score, to_generate):
        torch.testing.assert_close(combined[inside], (target - 0.8 * assistant)[inside])
    assert torch.equal(to_score[~inside], target[~inside])
    assert (to_generate[~inside] == -math.inf).all() and not inside.all()
    assert inside.gather(-1, to_generate.argmax(-1, keepdim=True)).all()


def test_all_kept_logits_below_zero_do_not_let_an_excluded_token_win():
    target, assistant = torch.tensor([-1.0, -1.5, -9.0, -9.0]), torch.tensor([4.0, 3.0, -4.0, 0.0])
    combined = logit_difference(target, assistant, 1.0, 0.5, "exclude")
    assert combined.argmax().item() == 1


def test_a_uniform_assistant_changes_no_probability():
    target = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    combined = logit_difference(target, torch.full((5, 9), 2.5), 0.8)
    torch.testing.assert_close(combined.softmax(-1), target.softmax(-1))


def test_whp_lowers_what_the_reinforced_model_raises_and_nothing_else():
    base, reinforced = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 1.0, -2.0])
    assert whp_logits(base, reinforced, 0.5).tolist() == [0.0, 1.0, 1.0]
    assert torch.equal(whp_logits(base, reinforced, 0.0), base)


def test_an_offset_carries_the_difference_over():
    target, tuned, untuned = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[5.0, 0.0]]),
        torch.tensor([[4.0, 3.0]]),
    )
    assert offset_logits(target, tuned, untuned, 2.0).tolist() == [[3.0, -4.0]]


def test_bad_weights_shares_and_vocabularies_are_refused():
    one = torch.zeros(2, 5)
    for call, named in (
        (lambda: logit_difference(one, one, -0.1), "alpha"),
        (lambda: whp_logits(one, one, float("nan")), "alpha"),
        (lambda: logit_difference(one, one, 1.0, 0.0), "relative_top"),
        (lambda: eligible(one, 1.1), "relative_top"),
        (lambda: logit_difference(one, one, 1.0, 0.5, "drop"), "drop"),
    ):
        with pytest.raises(InvalidHyperparameter, match=named):
            call()
    other = torch.zeros(2, 6)
    for combine in (logit_difference, whp_logits, lambda a, b: offset_logits(a, a, b)):
        with pytest.raises(ModelMismatch, match="vocabulary"):
            combine(one, other)
