"""Scores of MUSE: orientation of the privacy leak, cutting, checkpoints, folds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from palimpsest.core.errors import InvalidAudit, InvalidRecords, InvalidSplit
from palimpsest.suites import muse_scores as muse

SIGNALS = st.lists(st.integers(0, 12).map(float), min_size=2, max_size=12)


@given(SIGNALS, SIGNALS)
def test_the_area_is_the_chance_that_a_holdout_document_looks_more_like_a_member(forget, holdout):
    wins = [(h < f) + 0.5 * (h == f) for h in holdout for f in forget]
    found = muse.privacy_auc(np.array(forget), np.array(holdout))
    assert found == pytest.approx(np.mean(wins))
    labels = [0] * len(forget) + [1] * len(holdout)
    scores = [*forget, *holdout]
    assert found == pytest.approx(roc_auc_score(labels, [-score for score in scores]))
    other = muse.privacy_auc(np.array(forget), np.array(holdout), "open-unlearning")
    assert other == pytest.approx(roc_auc_score(labels, scores))


def test_the_untouched_target_is_near_minus_100_and_over_unlearning_is_positive():
    random = np.random.default_rng(0)
    holdout = random.normal(3, 0.3, 40)
    retrained = (random.normal(3, 0.3, 40), holdout)
    target = muse.measure_privacy_leak((random.normal(0.1, 0.05, 40), holdout), retrained)
    over = muse.measure_privacy_leak((random.normal(9, 0.3, 40), holdout), retrained)
    itself = muse.measure_privacy_leak(retrained, retrained)
    assert target.percent == pytest.approx(-100)
    assert over.percent > 40
    assert itself.percent == 0 and itself.fair
    assert target.low <= target.auc <= target.high


@given(st.floats(0, 1), st.floats(0.05, 0.95))
def test_both_orientations_give_the_same_figure(value: float, retrained: float):
    one = muse.privacy_leak(value, retrained)
    other = muse.privacy_leak(1 - value, 1 - retrained, "open-unlearning")
    assert one == pytest.approx(other, abs=1e-6)


def test_a_holdout_of_another_kind_is_noticed():
    random = np.random.default_rng(0)
    shifted = (random.normal(2, 0.3, 40), random.normal(3, 0.3, 40))
    assert not muse.measure_privacy_leak(shifted, shifted).fair


def test_what_is_not_defined_is_refused():
    two = np.array([1.0, 2.0])
    with pytest.raises(InvalidAudit, match="without a retrained model"):
        muse.measure_privacy_leak((two, two), None)
    with pytest.raises(InvalidAudit, match="without a retrained model"):
        muse.privacy_leak(0.3, None)
    with pytest.raises(InvalidAudit, match="is 0"):
        muse.privacy_leak(0.3, 0.0)
    with pytest.raises(InvalidAudit, match="is 0"):
        muse.privacy_leak(0.3, 1.0, "open-unlearning")
    with pytest.raises(InvalidAudit, match="2 or more holdout documents"):
        muse.privacy_auc(two, two[:1])
    with pytest.raises(InvalidAudit, match="signals of the forget documents are NaN"):
        muse.privacy_auc(np.array([1.0, math.nan]), two)
    with pytest.raises(InvalidAudit, match="orientation"):
        muse.privacy_auc(two, two, "member")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidAudit, match=r"\[0, 1\]"):
        muse.privacy_leak(50.0, 0.5)


def test_signals_are_low_for_members_and_short_documents_have_one_unless_as_released():
    scores = torch.tensor([[-0.1, -0.2, 0.0], [-3.0, -4.0, -5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert muse.privacy_signals(scores, mask).tolist() == pytest.approx([0.2, 5.0])
    released = muse.privacy_signals(scores, mask, as_released=True)
    assert math.isnan(released[0]) and released[1] == pytest.approx(5.0)
    with pytest.raises(InvalidAudit, match=r"\(0, 1\]"):
        muse.privacy_signals(scores, mask, k=40)


def test_a_question_comes_after_solved_examples_and_its_answer_ends_where_the_next_begins():
    prompt = muse.knowmem_prompt([("Who?", "Ann")], "Where?")
    assert prompt == "Question: Who?\nAnswer: Ann\n\nQuestion: Where?\nAnswer: "
    assert muse.cut_knowmem("Oslo\nQuestion: Why?") == "Oslo"
    assert muse.cut_knowmem("Oslo Question: Why?\n\nmore") == "Oslo "
    with pytest.raises(InvalidRecords, match="none is given"):
        muse.knowmem_prompt([], "Where?")


def test_memorisation_is_the_mean_f1_in_per_cent():
    found = muse.knowmem(["Oslo\n\nQuestion: x", "the city Rome"], ["Oslo", "Rome"])
    assert found.f1 == pytest.approx((1.0, 0.5))
    assert found.recall == pytest.approx((1.0, 1.0))
    assert found.value == pytest.approx(75)
    # A continuation is not cut at stops.
    assert muse.verbmem(["a b\n\nc d"], ["a b c d"]).value == pytest.approx(100)
    with pytest.raises(InvalidRecords, match="no generated text"):
        muse.knowmem([], [])


class Letters:
    """A tokenizer with a token per letter and one before the text."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(ord, text)]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join("" if skip_special_tokens and i == 0 else chr(i) for i in ids)


def test_a_token_before_the_text_counts_as_one_of_the_limit():
    assert muse.cut_to_tokens("abcdef", Letters(), 4) == "abc"


def test_the_first_checkpoint_at_or_below_the_retrained_model_is_chosen():
    assert muse.chosen_checkpoint([60, 33.1, 5], 33.1) == 1
    assert muse.chosen_checkpoint([20, 60, 5], 33.1) == 0
    assert muse.chosen_checkpoint([60, 50, 40], 33.1) == 2
    with pytest.raises(InvalidAudit, match="no checkpoint"):
        muse.chosen_checkpoint([], 1.0)
    with pytest.raises(InvalidAudit, match="NaN"):
        muse.chosen_checkpoint([math.nan], 1.0)


def test_growing_sets_hold_one_another_and_folds_share_nothing():
    muse.check_nested({"1": ["a"], "2": ["b", "a"], "3": ["a", "b", "c"]})
    muse.check_disjoint({"1": ["a", "b"], "2": ["c"]})
    with pytest.raises(InvalidSplit, match="'2' does not hold all of '1': 'a'"):
        muse.check_nested({"1": ["a"], "2": ["b", "c"]})
    with pytest.raises(InvalidSplit, match="no larger"):
        muse.check_nested({"1": ["a"], "2": ["a"]})
    with pytest.raises(InvalidSplit, match="'1' and '3' share the record 'a'"):
        muse.check_disjoint({"1": ["a"], "2": ["b"], "3": ["a"]})
    for check in (muse.check_nested, muse.check_disjoint):
        with pytest.raises(InvalidSplit, match="without records"):
            check({"1": ["a"], "2": []})
