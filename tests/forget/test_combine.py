"""Models combined token by token answer as one, whether they score or generate."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.forget.measuring import fingerprint
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.forget.language.combine import Combined, Difference, Offset, Reinforced
from palimpsest.forget.language.wrapped import Wrapped
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.decoder import truncated
from palimpsest.parts.tokens import token_mean

VOCABULARY = 40
KINDS = ("llama", "gpt2")


def network(kind: str, seed: int = 0) -> nn.Module:
    if kind == "llama":
        model = small_llama(VOCABULARY, width=32, layers=3, heads=2, length=48, seed=seed)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = GPT2Config(vocab_size=VOCABULARY, n_positions=48, n_embd=32, n_layer=3, n_head=2, **ends)
            model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # logits far from uniform
    return model


def assistant_of(model: nn.Module, seed: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    short = truncated(model, 2)
    with torch.no_grad():
        for parameter in short.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return short.eval()


@pytest.fixture(scope="module", params=KINDS)
def target(request) -> nn.Module:
    return network(request.param)


@pytest.fixture(scope="module")
def assistant(target) -> nn.Module:
    return assistant_of(target)


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts of different lengths, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :6] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def by_definition(
    target: nn.Module, assistant: nn.Module, ids: torch.Tensor, alpha: float, rho: float | None
):
    """Next-token logits of one unpadded row, written out for generation."""
    one, two = (model(input_ids=ids[None]).logits[0, -1].double() for model in (target, assistant))
    found = one - alpha * two
    if rho is not None:
        p = one.softmax(0)
        keep = max(1, int(rho * VOCABULARY))
        likely = (p >= rho * p.max()) | (p >= p.sort(descending=True).values[keep - 1])
        found[~likely] = -torch.inf
    return found


def written(sequences: torch.Tensor, width: int) -> list[list[int]]:
    """What was generated, each up to its end."""
    rows = []
    for row in sequences[:, width:].tolist():
        rows.append(row[: row.index(2)] if 2 in row else row)
    return rows


@torch.no_grad()
@pytest.mark.parametrize("rho", [None, 0.2])
def test_greedy_generation_is_the_rule_applied_token_by_token(target, assistant, prompts, rho):
    pair = Combined(target, [assistant], Difference(0.8, rho))
    ids, mask = prompts
    made = pair.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, (tokens, attended) in enumerate(zip(ids, mask, strict=True)):
        text, expected = tokens[attended.bool()], []
        for _ in range(10):
            token = int(by_definition(target, assistant, text, 0.8, rho).argmax())
            if token == 2:
                break
            expected.append(token)
            text = torch.cat([text, torch.tensor([token])])
        assert written(made, 8)[row] == expected


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"do_sample": True, "num_beams": 2, "top_k": 0},
    ],
    ids=["greedy", "beams", "sampling", "several samples", "sampled beams"],
)
def test_with_caches_it_writes_what_it_writes_without(target, assistant, prompts, settings):
    pair = Combined(target, [assistant], Difference(1.0, 0.3))
    ids, mask = prompts
    found = []
    for use_cache in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found.append(
                pair.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **settings
                )
            )
    assert torch.equal(*found)


@torch.no_grad()
def test_excluded_tokens_are_never_sampled(target, assistant, prompts):
    ids, mask = prompts
    pair = Combined(target, [assistant], Difference(1.0, 0.3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = pair.generate(
            input_ids=ids[:1], attention_mask=mask[:1], max_new_tokens=1, do_sample=True, top_k=0,
            num_return_sequences=200,
        )  # fmt: skip
    kept = by_definition(target, assistant, ids[0], 1.0, 0.3).isfinite()
    assert kept[made[:, -1]].all() and made[:, -1].unique().numel() > 1 and not kept.all()


@torch.no_grad()
def test_beams_find_the_likeliest_pair_of_tokens(target, assistant, prompts):
    """As wide as the vocabulary, beam search over two tokens is a search of everything."""
    ids = prompts[0][:1]
    pair = Combined(target, [assistant], Difference(0.7, None))
    made = pair.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2, num_beams=VOCABULARY,
        do_sample=False, early_stopping=False,
    )  # fmt: skip
    first = by_definition(target, assistant, ids[0], 0.7, None)
    first[2] = -torch.inf  # no end before two tokens
    best = -torch.inf
    for token in range(VOCABULARY):
        after = by_definition(target, assistant, torch.cat([ids[0], torch.tensor([token])]), 0.7, None)
        after[2] = -torch.inf
        total = first.log_softmax(0)[token] + after.log_softmax(0)
        if float(total.max()) > best:
            best, expected = float(total.max()), [token, int(total.argmax())]
    assert made[0, -2:].tolist() == expected


@torch.no_grad()
def test_scored_tokens_that_are_unlikely_keep_the_targets_logit(target, assistant, prompts):
    ids = prompts[0][:1]
    scores = Combined(target, [assistant], Difference(0.8, 0.3))(input_ids=ids).logits[0]
    one, two = (model(input_ids=ids).logits[0] for model in (target, assistant))
    for at in range(ids.shape[1]):
        kept = by_definition(target, assistant, ids[0, : at + 1], 0.8, 0.3).isfinite()
        torch.testing.assert_close(scores[at], torch.where(kept, one[at] - 0.8 * two[at], one[at]))
        assert 0 < kept.sum() < VOCABULARY


@torch.no_grad()
def test_alpha_zero_is_the_target_exactly(target, assistant, prompts):
    ids, mask = prompts
    pair = Combined(target, [assistant], Difference(0.0, 0.01))
    assert torch.equal(pair(input_ids=ids).logits, target(input_ids=ids).logits)
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        made = []
        for model in (pair, target):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                made.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **settings))
        assert torch.equal(*made)


def test_the_loss_is_that_of_combined_logits_and_has_a_gradient(target, assistant, prompts):
    ids, _ = prompts
    pair = copy.deepcopy(Combined(target, [assistant], Difference(0.5, None)))
    output = pair(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.loss, token_mean(output.logits, ids))
    assert not torch.isclose(output.loss, target(input_ids=ids, labels=ids).loss)
    output.loss.backward()
    assert all(
        model.get_input_embeddings().weight.grad.abs().sum() > 0 for model in (pair.inner, *pair.others)
    )


@torch.no_grad()
def test_hidden_states_are_the_targets(target, assistant, prompts):
    ids, _ = prompts
    pair = Combined(target, [assistant], Difference())
    found = pair(input_ids=ids, output_hidden_states=True).hidden_states
    expected = target(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@torch.no_grad()
def test_reinforced_and_offset_models_follow_their_formulas(target, assistant, prompts):
    ids, _ = prompts
    one, two = (model(input_ids=ids).logits for model in (target, assistant))
    lowered = Combined(target, [assistant], Reinforced(1.5))(input_ids=ids).logits
    torch.testing.assert_close(lowered, one - 1.5 * (two - one).clamp(min=0))
    untuned = truncated(target, 1)
    moved = Combined(target, [assistant, untuned], Offset(2.0))(input_ids=ids).logits
    torch.testing.assert_close(moved, one + 2 * (two - untuned(input_ids=ids).logits))


@torch.no_grad()
def test_a_pair_inside_a_wrapper_still_generates_as_a_pair(target, assistant, prompts):
    ids, mask = prompts
    pair = Combined(target, [assistant], Difference(1.0, 0.3))
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    around = Wrapped(pair)
    assert torch.equal(around.generate(**settings), pair.generate(**settings))
    assert torch.equal(around.generate(use_cache=False, **settings), pair.generate(**settings))


def test_models_are_used_as_they_are_and_can_be_taken_out(target, assistant):
    before = fingerprint(target)
    pair = Combined(target, [assistant], Difference())
    assert pair.inner is target and pair.others[0] is assistant and fingerprint(target) == before
    assert pair.config is target.config


def test_what_cannot_be_combined_is_refused(target, assistant):
    with pytest.raises(ModelMismatch, match="vocabulary"):
        Combined(target, [small_llama(VOCABULARY + 1, width=16, layers=1, heads=2)], Difference())
    with pytest.raises(ModelMismatch, match="causal model"):
        Combined(target, [nn.Linear(2, 2)], Difference())
    with pytest.raises(InvalidHyperparameter, match="3 models, not 2"):
        Combined(target, [assistant], Offset())
    for settings in ({"alpha": -0.1}, {"relative_top": 0.0}, {"relative_top": 1.1}):
        with pytest.raises(InvalidHyperparameter):
            Difference(**settings)
    with pytest.raises(InvalidHyperparameter):
        Reinforced(-1.0)


def test_a_cache_of_another_model_is_refused(target, assistant, prompts):
    ids, _ = prompts
    foreign = target(input_ids=ids, use_cache=True)
    with pytest.raises(ModelMismatch, match="cache"):
        Combined(target, [assistant], Difference())(input_ids=ids[:, :1], cache=foreign.cache)
