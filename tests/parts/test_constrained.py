"""The phrase machine is held to plain search, the logits processor to transformers' own generation code."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.constrained import (
    START,
    ForbiddenPhrases,
    penalised,
    phrase_machine,
    token_sequences,
    written_forms,
)

TOKENS = 4
tokens = st.integers(0, TOKENS - 1)
sequence = st.lists(tokens, min_size=1, max_size=4).map(tuple)
phrases = st.lists(sequence, min_size=1, max_size=6)
text = st.lists(tokens, max_size=12)


def occurs(phrase, row) -> bool:
    return any(tuple(row[at : at + len(phrase)]) == phrase for at in range(len(row) - len(phrase) + 1))


@given(phrases, text)
def test_a_text_leaks_exactly_if_a_phrase_occurs_in_it(forbidden, row):
    assert phrase_machine(forbidden).leaks(row) == any(occurs(phrase, row) for phrase in forbidden)


@given(phrases, text)
def test_what_a_token_would_do_is_what_reading_the_text_again_says(forbidden, row):
    machine = phrase_machine(forbidden)
    moves = machine.moves(machine.run(row))
    known = dict(
        zip(
            moves.tokens.tolist(),
            zip(moves.share.tolist(), moves.complete.tolist(), strict=True),
            strict=True,
        )
    )
    for token in range(TOKENS):
        after = (*row, token)
        completes = any(after[-len(phrase) :] == phrase for phrase in forbidden)
        share = max(
            (
                size / len(phrase)
                for phrase in forbidden
                for size in range(1, len(phrase) + 1)
                if after[-size:] == phrase[:size]
            ),
            default=0.0,
        )
        assert known.get(token, (0.0, False)) == (pytest.approx(share), completes)


@given(phrases, text, text)
def test_a_state_is_all_that_must_be_kept_of_what_was_written(forbidden, first, second):
    machine = phrase_machine(forbidden)
    assert machine.run(second, machine.run(first)) == machine.run([*first, *second])
    assert machine.states([*first, *second])[len(first) :] == [
        machine.run([*first, *second[:at]]) for at in range(len(second))
    ]


@given(phrases)
@settings(deadline=None)
def test_the_tokens_that_are_left_write_every_text_without_a_phrase_and_no_other(forbidden):
    machine = phrase_machine(forbidden)
    written = {()}
    for _ in range(4):
        scores = penalised(
            torch.zeros(len(written), TOKENS), [machine] * len(written), [machine.run(row) for row in written]
        )
        written = {
            (*row, token)
            for row, own in zip(written, scores, strict=True)
            for token in range(TOKENS)
            if own[token] == 0
        }
    every = itertools.product(range(TOKENS), repeat=4)
    assert written == {row for row in every if not any(occurs(phrase, row) for phrase in forbidden)}


def test_a_token_that_continues_a_phrase_costs_the_matched_share():
    machine = phrase_machine([(1, 2, 3, 0)])
    scores = penalised(
        torch.zeros(3, 5), [machine] * 3, [machine.run(row) for row in ([], [1], [4, 1, 2, 3])], prefix=2.0
    )
    assert scores.tolist() == [[0, -0.5, 0, 0, 0], [0, -0.5, -1.0, 0, 0], [-math.inf, -0.5, 0, 0, 0]]


def test_rows_without_a_machine_and_the_scores_that_were_given_stay_as_they_are():
    scores = torch.randn(2, 5)
    before = scores.clone()
    after = penalised(scores, [None, phrase_machine([(3,)])], [START, START])
    assert torch.equal(scores, before) and torch.equal(after[0], before[0])
    assert after[1, 3] == -math.inf and torch.equal(after[1, :3], before[1, :3])
    assert penalised(scores, [None, None], [START, START]) is scores


def test_tokenizers_see_a_phrase_with_and_without_blank_in_every_case():
    assert set(written_forms(" ada Byron")) == {
        blank + form
        for blank in ("", " ")
        for form in ("ada Byron", "ada byron", "ADA BYRON", "Ada byron", "Ada Byron")
    }
    found = token_sequences(["ab", "..."], lambda text: [ord(sign) for sign in text])
    assert (97, 98) in found and (32, 65, 66) in found and len(found) == len(set(found))


@pytest.fixture(scope="module")
def model():
    network = small_llama(12, width=16, layers=1, heads=2)
    with torch.no_grad():
        network.lm_head.weight *= 20
    return network


@pytest.mark.parametrize("beams", [1, 4])
def test_no_output_of_transformers_holds_a_phrase_whatever_its_beams_do(model, beams):
    prompts = torch.tensor([[1, 5, 6], [1, 7, 8]])
    how = {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": 8,
        "num_beams": beams,
        "do_sample": False,
    }
    free = model.generate(input_ids=prompts, **how)[:, 3:].tolist()
    machines = []
    for row in free:  # everything that was said, as phrases of two tokens
        machines.append(phrase_machine([tuple(row[at : at + 2]) for at in range(len(row) - 1)]))
    held = model.generate(input_ids=prompts, logits_processor=[ForbiddenPhrases(machines, prompt=3)], **how)
    assert all(machine.leaks(row) for machine, row in zip(machines, free, strict=True))
    assert not any(machine.leaks(row) for machine, row in zip(machines, held[:, 3:].tolist(), strict=True))
    assert not torch.equal(torch.tensor(free), held[:, 3:])


def test_the_prompt_is_not_matched(model):
    prompt = torch.tensor([[1, 5, 6]])
    first = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False
    )[0, 3]
    scores = torch.zeros(1, 12)
    through_the_prompt = ForbiddenPhrases(phrase_machine([(6, int(first))]), prompt=3)(prompt, scores)
    assert torch.equal(through_the_prompt, scores)
    both = ForbiddenPhrases(phrase_machine([(6, int(first))]), prompt=2)(prompt, scores)
    assert both[0, first] == -math.inf


def test_bad_input_is_named():
    with pytest.raises(InvalidHyperparameter, match="no tokens"):
        phrase_machine([(1,), ()])
    with pytest.raises(ModelMismatch, match="token 9, the vocabulary has 5"):
        penalised(torch.zeros(1, 5), [phrase_machine([(9,)])], [START])
    with pytest.raises(InvalidHyperparameter, match="prefix"):
        ForbiddenPhrases(phrase_machine([(1,)]), 0, prefix=-1)
    with pytest.raises(ModelMismatch, match="3 rows"):
        ForbiddenPhrases([phrase_machine([(1,)])] * 2, 0)(
            torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 5)
        )
