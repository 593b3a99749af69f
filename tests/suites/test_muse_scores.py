"""Scores of MUSE: cutting, checkpoints, folds."""

from __future__ import annotations

import math

import pytest

from palimpsest.core.errors import InvalidAudit, InvalidRecords, InvalidSplit
from palimpsest.suites import muse_scores as muse


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
