"""ECO's corruptions and the prompts of in-context unlearning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.forget.language.corruption import (
    CORRUPTIONS,
    all_but_last,
    carry_labels,
    corrupt,
    zeroth_order_step,
)
from palimpsest.forget.language.in_context import flipped_label_prompt, unaware_prompt

TOKENS = torch.tensor([[True, False, True], [False, False, True]])


@pytest.fixture
def embeddings():
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("dims", [1, 3, 8])
def test_only_so_many_coordinates_of_the_chosen_tokens_change(name, dims, embeddings):
    before = embeddings.clone()
    found = corrupt(embeddings, TOKENS, name, dims, 2.0, torch.Generator().manual_seed(1))
    changed = found != embeddings
    assert changed.sum(-1)[TOKENS].tolist() == [dims] * 3
    assert not changed[~TOKENS].any()
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize("name", [n for n, c in CORRUPTIONS.items() if c.change not in ("zero", "flip")])
def test_a_strength_of_zero_changes_nothing(name, embeddings):
    assert torch.equal(corrupt(embeddings, TOKENS, name, 3, 0.0), embeddings)


def test_top_goes_by_magnitude_for_zero_and_flip_and_by_value_for_subtraction():
    token = torch.tensor([[[0.5, -3.0, 2.0, -1.0]]])
    here = torch.tensor([[True]])
    expected = {
        "zero-top": [0.5, 0.0, 0.0, -1.0],
        "flip-top": [0.5, 3.0, -2.0, -1.0],
        "subtract-top": [-0.5, -3.0, 1.0, -1.0],
        "add-least": [0.5, -2.0, 2.0, 0.0],
        "add-first": [1.5, -2.0, 2.0, -1.0],
    }
    for name, values in expected.items():
        assert corrupt(token, here, name, 2, 1.0).flatten().tolist() == values


def test_noise_has_the_strength_as_deviation_and_comes_from_the_generator():
    zeros, everywhere = torch.zeros(10, 200, 4), torch.ones(10, 200, dtype=torch.bool)
    one, two = (
        corrupt(zeros, everywhere, "noise-first", 2, 0.7, torch.Generator().manual_seed(3)) for _ in "ab"
    )
    assert torch.equal(one, two)
    assert one[..., :2].std().item() == pytest.approx(0.7, rel=0.05) and not one[..., 2:].any()


def test_bad_corruptions_are_refused(embeddings):
    with pytest.raises(UnknownName, match="zero-top"):
        corrupt(embeddings, TOKENS, "zero-topp")
    with pytest.raises(ModelMismatch, match="mask"):
        corrupt(embeddings, TOKENS[:, :2])
    with pytest.raises(ModelMismatch, match="boolean"):
        corrupt(embeddings, TOKENS.int())
    for settings_, named in (({"dims": 9}, "dims"), ({"dims": 0}, "dims"), ({"strength": -1.0}, "strength")):
        with pytest.raises(InvalidHyperparameter, match=named):
            corrupt(embeddings, TOKENS, **settings_)


cuts = st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True).map(sorted)


@given(cuts, cuts, st.data())
@settings(deadline=None)
def test_a_label_is_carried_to_exactly_the_tokens_that_share_a_character(ours, theirs, data):
    source, target = (list(zip([0, *ends], [*ends, 31], strict=True)) for ends in (ours, theirs))
    labels = data.draw(st.lists(st.integers(0, 1), min_size=len(source), max_size=len(source)))
    marked = {
        at for (start, end), label in zip(source, labels, strict=True) if label for at in range(start, end)
    }
    expected = [int(bool(marked & set(range(start, end)))) for start, end in target]
    assert carry_labels(labels, source, target) == expected
    with pytest.raises(ModelMismatch):
        carry_labels([*labels, 1], source, target)


def test_without_a_label_all_but_the_last_real_token_are_corrupted():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert all_but_last(mask).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_the_search_goes_down_a_score_to_its_minimum():
    strength = 0.1
    for _ in range(200):
        strength = zeroth_order_step(lambda s: (s - 2) ** 2, strength, lr=0.1, eps=0.05).strength
    assert strength == pytest.approx(2.0, abs=1e-6)


def test_the_search_stays_above_its_minimum_and_never_asks_for_a_negative_strength():
    asked = []

    def score(strength):
        asked.append(strength)
        return strength

    step = zeroth_order_step(score, 0.02, lr=1.0, eps=0.05, minimum=0.01)
    assert asked == [pytest.approx(0.07), 1e-8] and step.strength == 0.01
    for bad in ({"lr": 0.0, "eps": 1.0}, {"lr": 1.0, "eps": 0.0}):
        with pytest.raises(InvalidHyperparameter):
            zeroth_order_step(score, 1.0, **bad)


def test_prompts_show_flipped_labels_first_and_leave_the_query_open():
    prompt = flipped_label_prompt([("a", "no"), ("b", "yes")], [("c", "yes")], "d")
    assert prompt.split("\n") == ["a no", "b yes", "c yes", "d"]
    with pytest.raises(InvalidRecords):
        flipped_label_prompt([], [("c", "yes")], "d")


def test_an_instruction_names_every_topic_and_ends_with_the_question():
    prompt = unaware_prompt(
        ["Ada Lind", "Noor Abadi"], "Where does Ada Lind live?", [("Who is Noor?", "Unknown.")]
    )
    assert "Ada Lind, Noor Abadi" in prompt and "Question: Who is Noor?\nAnswer: Unknown." in prompt
    assert prompt.endswith("Question: Where does Ada Lind live?\nAnswer:")
    with pytest.raises(InvalidRecords):
        unaware_prompt([], "Where?")
