"""Memorisation from padded batches, against brute force over rows and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit import memorisation as measures
from palimpsest.core.errors import InvalidAudit, ModelMismatch, NonFinite
from palimpsest.parts.tokens import IGNORED


def strength_by_hand(hits: list[bool]) -> float:
    """Try every number of given tokens, fewest first."""
    for given_first in range(len(hits) + 1):
        if all(hits[given_first:]):
            return 1 - given_first / len(hits)
    raise AssertionError


def batch_of(rows: list[list[bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits padded on both sides, with hits in the padding that must not count."""
    width = max(map(len, rows)) + 2
    hits, mask = (
        torch.ones(len(rows), width, dtype=torch.bool),
        torch.zeros(len(rows), width, dtype=torch.bool),
    )
    for index, row in enumerate(rows):
        hits[index, 1 : 1 + len(row)] = torch.tensor(row, dtype=torch.bool)
        mask[index, 1 : 1 + len(row)] = True
    return hits, mask


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=5))
def test_batches_agree_with_brute_force(rows: list[list[bool]]):
    hits, mask = batch_of(rows)
    strength = measures.extraction_strength(hits, mask).tolist()
    exact = measures.exact_memorisation(hits, mask).tolist()
    released = measures.extraction_strength(hits, mask, as_released=True).tolist()
    for row, *found in zip(rows, strength, exact, released, strict=True):
        assert found[0] == pytest.approx(strength_by_hand(row))
        assert found[1] == pytest.approx(sum(row) / len(row))
        assert found[2] == pytest.approx(max(strength_by_hand(row), 1 / len(row)))


def test_a_total_miss_has_strength_zero_and_as_released_the_floor():
    hits, mask = batch_of([[False] * 4])
    assert measures.extraction_strength(hits, mask).tolist() == [0.0]
    assert measures.extraction_strength(hits, mask, as_released=True).tolist() == [0.25]
    assert measures.lowest_strength(torch.tensor([4])).tolist() == [0.0]
    assert measures.lowest_strength(torch.tensor([4]), as_released=True).tolist() == [0.25]


def test_an_answer_without_tokens_is_left_out_and_counted():
    hits, mask = batch_of([[True, True], []])
    assert math.isnan(measures.exact_memorisation(hits, mask)[1])
    assert math.isnan(measures.extraction_strength(hits, mask)[1])
    assert measures.extraction_strength(hits, mask, as_released=True).tolist() == [1.0, 0.0]
    assert measures.mean_over_texts(measures.exact_memorisation(hits, mask)) == (1.0, 1)
    with pytest.raises(InvalidAudit, match="nothing can be averaged"):
        measures.mean_over_texts(torch.tensor([math.nan]))


def test_one_pass_gives_all_measures_with_the_shift_of_causal_models():
    tokens = torch.tensor([[5, 1, 2, 3, 0], [4, 2, 2, 0, 0]])
    labels = torch.tensor([[IGNORED, IGNORED, 2, 3, 0], [IGNORED, 2, 2, 0, IGNORED]])
    logits = torch.full((2, 5, 6), 0.0)
    for row in range(2):
        for position in range(4):
            logits[row, position, tokens[row, position + 1]] = 3.0
    logits[0, 1] = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 0.0])  # the first answer token is missed
    found = measures.memorisation(logits, labels)
    assert found.tokens.tolist() == [2, 2]
    assert found.exact.tolist() == [0.5, 1.0]
    assert found.strength.tolist() == [0.5, 1.0]
    right = math.exp(3) / (math.exp(3) + 5)
    assert found.probability[1].item() == pytest.approx(right, rel=1e-5)
    assert found.probability[0].item() == pytest.approx((right**2 / (math.exp(3) + 5)) ** (1 / 3), rel=1e-5)
    everything = measures.memorisation(logits, labels, drop_last=False)
    assert everything.tokens.tolist() == [3, 3]
    assert everything.exact[0].item() == pytest.approx(2 / 3)


def test_padding_further_changes_nothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 7), torch.randint(7, (3, 6))
    labels[:, :2] = IGNORED
    wide = (
        torch.cat([logits, torch.randn(3, 4, 7)], 1),
        torch.nn.functional.pad(labels, (0, 4), value=IGNORED),
    )
    for name in ("exact", "strength", "probability"):
        one, other = (getattr(measures.memorisation(*pair), name) for pair in ((logits, labels), wide))
        torch.testing.assert_close(one, other)


def test_a_row_of_one_token_has_nothing_to_score():
    found = measures.memorisation(torch.zeros(1, 1, 4), torch.tensor([[2]]))
    assert found.tokens.tolist() == [0]
    assert all(math.isnan(value) for value in (found.exact, found.strength, found.probability))


def test_broken_inputs_are_refused():
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[IGNORED, 1, 2]])
    with pytest.raises(NonFinite, match="NaN"):
        measures.memorisation(logits * math.nan, labels)
    with pytest.raises(ModelMismatch, match="Logits"):
        measures.memorisation(logits, labels[:, :2])
    with pytest.raises(InvalidAudit, match="mask of their shape"):
        measures.exact_memorisation(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool))
