"""The beam search is held to transformers' own, to a search of everything, and to what it may not write."""

import itertools
import math

import pytest
import torch
from torch import nn

from palimpsest.models.small_llama import small_llama
from palimpsest.parts.beam_search import Restriction, Search, beam_search, common_start
from palimpsest.parts.constrained import phrase_machine

END = 2


def network(vocabulary, seed=0, sharp=12.0, layers=2):
    model = small_llama(vocabulary, width=16, layers=layers, heads=2, seed=seed)
    with torch.no_grad():
        model.lm_head.weight *= sharp
    return model


def prompts():
    ids = torch.tensor([[1, 5, 6, 7], [0, 1, 8, 9], [0, 0, 1, 3]])
    return ids, (ids != 0).long()


class Uncached(nn.Module):
    """A model that keeps nothing and counts its own positions from the mask."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask, use_cache=False):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        output = self.inner(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
        return type("Output", (), {"logits": output.logits})()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [1, 3, 5])
def test_without_restriction_it_finds_what_transformers_finds(seed, width):
    model = network(24, seed)
    ids, mask = prompts()
    theirs = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=width, max_new_tokens=7, do_sample=False, length_penalty=1.0,
        eos_token_id=END, pad_token_id=0, early_stopping=False,
    )[:, 4:]  # fmt: skip
    ours = beam_search(model, ids, mask, Search(width, 7, frozenset({END})))
    for row, found in zip(theirs.tolist(), ours, strict=True):
        cut = row.index(END) + 1 if END in row else len(row)
        assert list(found[0].tokens) == row[:cut]


def test_a_model_without_a_cache_is_searched_alike():
    model = network(24)
    ids, mask = prompts()
    search = Search(3, 5, frozenset({END}))
    assert [found[0].tokens for found in beam_search(Uncached(model), ids, mask, search)] == [
        found[0].tokens for found in beam_search(model, ids, mask, search)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_wide_enough_it_finds_the_best_of_all_answers_without_a_phrase(seed):
    model, size, longest = network(6, seed, layers=1), 6, 3
    ids = torch.tensor([[1, 3, 4]])
    with torch.no_grad():
        every = [row for row in itertools.product(range(size), repeat=longest) if END not in row[:-1]]
        every += [
            (*row, END)
            for short in range(longest - 1)
            for row in itertools.product([0, 1, 3, 4, 5], repeat=short)
        ]
        scored = {}
        for row in every:
            whole = torch.tensor([[*ids[0].tolist(), *row]])
            log_p = model(whole).logits[0].log_softmax(-1)
            scored[row] = sum(float(log_p[2 + at, token]) for at, token in enumerate(row)) / len(row)
    free = max(scored, key=scored.__getitem__)
    machine = phrase_machine([free[:2] if len(free) > 1 else free])
    best = max((row for row in scored if not machine.leaks(row)), key=scored.__getitem__)
    search = Search(size**longest, longest, frozenset({END}))
    assert beam_search(model, ids, torch.ones_like(ids), search)[0][0].tokens == free
    found = beam_search(model, ids, torch.ones_like(ids), search, Restriction([machine]))[0][0]
    assert found.tokens == best
    assert found.normalised(1.0) == pytest.approx(scored[best], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_prompts_that_are_searched_together_are_answered_as_alone(seed):
    model = network(24, seed)
    ids, mask = prompts()
    search = Search(3, 6, frozenset({END}))
    machines = [phrase_machine([(token,) for token in range(3 + at, 20, 3)]) for at in range(3)]
    together = beam_search(model, ids, mask, search, Restriction(machines))
    for row in range(3):
        alone = beam_search(
            model, ids[row : row + 1], mask[row : row + 1], search, Restriction([machines[row]])
        )
        assert alone[0][0].tokens == together[row][0].tokens
        assert not machines[row].leaks(together[row][0].tokens)


def test_beams_take_the_states_of_their_phrases_along_when_they_change_places():
    """All pairs of the free search's best beams are forbidden: any state lost on the way would let one through."""
    for seed in range(6):
        model = network(16, seed, sharp=6.0)
        ids = torch.tensor([[1, 3, 4]])
        mask = torch.ones_like(ids)
        search = Search(4, 6, frozenset({END}), returned=4)
        free = [one.tokens for one in beam_search(model, ids, mask, search)[0]]
        pairs = {row[at : at + 2] for row in free for at in range(len(row) - 1)}
        machine = phrase_machine(pairs)
        held = beam_search(model, ids, mask, search, Restriction([machine]))[0]
        assert held and not any(pair in itertools.pairwise(one.tokens) for one in held for pair in pairs)


def test_a_judge_that_rejects_is_obeyed_and_one_that_charges_moves_the_order():
    model = network(24)
    ids = torch.tensor([[1, 3, 4]])
    mask = torch.ones_like(ids)
    search = Search(3, 4, frozenset({END}))
    free = beam_search(model, ids, mask, search)[0][0].tokens

    def forbid(prompt, candidates):
        return [math.inf if free[0] in one else 0.0 for one in candidates]

    def charge(prompt, candidates):
        return [50.0 if free[0] in one else 0.0 for one in candidates]

    for judge, reorders in ((forbid, False), (charge, True)):
        found = beam_search(model, ids, mask, search, Restriction(judge=judge, reorders=reorders))[0][0]
        assert free[0] not in found.tokens and not found.fallback


def test_where_nothing_is_allowed_the_answer_ends_with_what_the_last_beams_shared():
    model = network(24)
    ids = torch.tensor([[1, 3, 4]])
    mask = torch.ones_like(ids)
    search = Search(3, 6, frozenset({END}))

    def silence(prompt, candidates):
        return [math.inf] * len(candidates)

    assert beam_search(model, ids, mask, search, Restriction(judge=silence))[0][0].tokens == (END,)
    first = int(model(ids).logits[0, -1].argmax())

    def one_word(prompt, candidates):
        return [0.0 if tuple(one) == (first,) else math.inf for one in candidates]

    found = beam_search(model, ids, mask, search, Restriction(judge=one_word))[0][0]
    assert found.tokens == (first, END) and found.fallback


def test_what_is_called_certain_is_how_the_answer_begins():
    for seed in range(6):
        model = network(20, seed, sharp=25.0)
        ids = torch.tensor([[1, 3, 4]])
        certain: list[tuple[int, ...]] = []
        search = Search(3, 8, frozenset({END}))
        found = beam_search(model, ids, torch.ones_like(ids), search, shared=certain.append)[0][0].tokens
        assert all(found[: len(one)] == one for one in certain)
        assert [len(one) for one in certain] == sorted(len(one) for one in certain)


def test_the_common_start_of_rows():
    assert common_start([(1, 2, 3), (1, 2, 4), (1, 2)]) == (1, 2)
    assert common_start([(1, 2), (3,)]) == () and common_start([]) == () and common_start([(4, 5)]) == (4, 5)
