"""Optimised prompts (A5): the search against brute force and its own gradient, and the audit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from palimpsest.audit.attacks.suffix_search import Budget, Rows, forced, losses, search
from palimpsest.audit.language.asked import once_each, questions
from palimpsest.audit.language.optimised_prompts import OptimisedPrompts, halves
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.finding import Judgement
from palimpsest.forget.language.wrapped import Wrapped

PAIRS = [("Where does Eva live?", "Almora"), ("What does Ben do?", "a baker")]


def test_the_loss_of_a_suffix_is_that_of_its_tokens_alone(learnt):
    model, task = learnt.original, learnt.task
    suffix = torch.tensor([[20, 21, 22], [30, 31, 32]])
    found = losses(task, model, Rows(task, PAIRS, 3), suffix)
    for at, tokens in enumerate(suffix.tolist()):
        each = []
        for question, answer in PAIRS:
            head, tail = task.tokens(f"Question: {question}", first=True), task.tokens("\nAnswer:")
            said = task.tokens(f" {answer}")
            ids = torch.tensor([[*head, *tokens, *tail, *said]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            start = ids.shape[1] - len(said)
            each.append(-sum(float(log_p[start - 1 + n, token]) for n, token in enumerate(said)) / len(said))
        assert float(found[at]) == pytest.approx(sum(each) / 2, rel=1e-4)


def test_the_search_lowers_the_loss_never_raises_it_and_leaves_the_model_alone(learnt):
    model = copy.deepcopy(learnt.original)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = search(learnt.task, model, PAIRS, Budget(4, 6, 8, 8), torch.Generator().manual_seed(0))
    assert found.after < found.before
    assert list(found.curve) == sorted(found.curve, reverse=True)
    best = losses(learnt.task, model, Rows(learnt.task, PAIRS, 4), found.tokens[None])
    assert float(best[0]) == pytest.approx(found.after, rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_seed_finds_the_same_suffix(learnt):
    runs = [
        search(
            learnt.task, learnt.original, PAIRS, Budget(3, 2, 4, 4), torch.Generator().manual_seed(1)
        ).tokens
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_special_tokens_are_never_part_of_a_suffix(learnt):
    found = search(learnt.task, learnt.original, PAIRS, Budget(8, 1, 4, 4), torch.Generator().manual_seed(2))
    assert not set(found.tokens.tolist()) & set(learnt.task.encoder.all_special_ids)


def test_forced_means_that_every_token_is_the_likeliest(learnt):
    said = learnt.task.generate(learnt.original, ["Where does Eva live?"])[0][0]
    ids = torch.tensor([], dtype=torch.long)
    assert forced(learnt.task, learnt.original, [("Where does Eva live?", said), ("Where does Eva live?", "zzz")], ids).tolist() == [True, False]  # fmt: skip


def test_subjects_are_fitted_to_or_tested_on_never_both(evidence):
    fitted, held = halves(once_each(questions(evidence, "forget", None)))
    assert fitted and held
    assert not {item.subject for item in fitted} & {item.subject for item in held}


def test_the_audit_gives_transfer_and_the_gain_over_what_nobody_learnt(judge, evidence):
    found = judge(OptimisedPrompts(length=4, steps=2, candidates=4, top_k=8, limit=6), evidence.original)
    assert {"transfer_hit", "fitted_gain", "gain_over_wrong", "gain_over_never_trained"} <= set(found)
    transfer = found["transfer_hit"]
    assert transfer.value == transfer.original and "2 steps of 4 swaps" in transfer.note


def test_a_model_without_embedded_inputs_is_not_searched(judge, evidence):
    class Closed(Wrapped):
        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

    found = judge(OptimisedPrompts(length=4, steps=2, candidates=4, limit=6), Closed(evidence.original))
    assert found["transfer_hit"].judgement is Judgement.NOT_RUN
    assert "embedded inputs" in found["transfer_hit"].note


@pytest.mark.parametrize("settings", [{"steps": 0}, {"length": 0}, {"limit": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidAudit):
        OptimisedPrompts(**settings)
