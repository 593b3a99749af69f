"""Losses from a head that is applied where something is scored are those of all logits, for every kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from palimpsest.core.errors import InvalidLabels, ModelMismatch
from palimpsest.core.modes import seeded
from palimpsest.forget.language.wrapped import Call, Wrapped, ask
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.parts.scored_head import head_at
from palimpsest.parts.tokens import IGNORED, row_means, scored_losses, token_losses
from palimpsest.tasks.language import Language

ROWS = [
    {"id": "long", "question": "Where does Ada of Ostby live, as far as it is known?", "answer": "Ostby."},
    {"id": "short", "question": "Who is Bo?", "answer": "A baker from Nordby who bakes."},
    {"id": "text", "text": "Bo bakes in Nordby."},
]
TOKENIZER = byte_pair_tokenizer(
    [text for row in ROWS for text in row.values()] + ["Question: Answer:"], vocabulary=300
)
SIZE = len(TOKENIZER)


def llama(**settings: Any) -> nn.Module:
    return small_llama(SIZE, width=16, layers=2, heads=2, **settings)


def with_adapters() -> nn.Module:
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return adapted


def gemma() -> nn.Module:
    """Its logits are capped after the head."""
    config = Gemma2Config(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.05,
    )
    with seeded(0):
        return Gemma2ForCausalLM(config)


def gpt2() -> nn.Module:
    with seeded(0):
        return GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=128))


class Louder(Wrapped):
    """Answers with something made of all logits of the model inside."""

    def answer(self, call: Call) -> Any:
        output = ask(self.inner, call)
        places = torch.arange(1, output.logits.shape[1] + 1)
        output.logits = output.logits * places[None, :, None]
        return output


class Plain(nn.Module):
    """A user's own module, without a head to be found."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.embed, self.out = nn.Embedding(SIZE, 16), nn.Linear(16, SIZE)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(self.embed(input_ids).cumsum(1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "untied": llama,
    "tied": lambda: llama(tied=True),
    "adapters": with_adapters,
    "soft cap": gemma,
    "gpt2": gpt2,
    "data parallel": lambda: nn.DataParallel(llama()),
    "wrapped": lambda: Louder(llama()),
    "own module": Plain,
}
SPARED = {"untied", "tied", "adapters", "soft cap", "gpt2", "data parallel"}


@pytest.fixture(scope="module")
def task() -> Language:
    return Language(tokenizer=TOKENIZER)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_all_logits(task: Language, kind: str):
    model, batch = KINDS[kind]().eval(), task.collate(ROWS)

    spared = task.token_losses(model, batch)
    whole = token_losses(task.logits(model, batch), batch["labels"])

    torch.testing.assert_close(spared, whole)
    weights = torch.rand(whole.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        gradients(model, (spared * weights).sum()), gradients(model, (whole * weights).sum())
    )
    torch.testing.assert_close(task.loss_per_example(model, batch), row_means(whole, batch["labels"]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_works_for_scored_tokens_only_and_for_all_again_afterwards(task: Language, kind: str):
    model, batch = KINDS[kind]().eval(), task.collate(ROWS)
    rows: list[int] = []
    own = next(m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == SIZE)
    own.register_forward_hook(lambda _m, _i, output: rows.append(output.numel() // SIZE))

    task.token_losses(model, batch)
    task.logits(model, batch)

    everywhere = batch["labels"].numel()
    labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert labelled < everywhere / 2
    assert rows == [labelled if kind in SPARED else everywhere, everywhere]


def test_an_error_inside_leaves_no_trace(task: Language):
    model, batch = llama(), task.collate(ROWS)
    with pytest.raises(ZeroDivisionError), head_at(model, batch["labels"] > 0):
        1 / 0  # noqa: B018
    assert task.logits(model, batch).shape[:2] == batch["labels"].shape


def test_a_batch_in_which_nothing_is_scored_costs_nothing(task: Language):
    model, batch = llama(), task.collate(ROWS)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    losses = task.loss_per_example(model, batch)
    assert losses.tolist() == [0.0, 0.0, 0.0]
    assert all(not gradient.any() for gradient in gradients(model, losses.sum()).values())


def test_losses_are_at_least_in_single_precision(task: Language):
    model, batch = llama().to(torch.bfloat16), task.collate(ROWS)
    losses = task.token_losses(model, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, token_losses(task.logits(model, batch), batch["labels"]))


def test_rows_that_are_not_those_of_the_labels_are_refused():
    labels = torch.tensor([[IGNORED, 2, 3]])
    with pytest.raises(ModelMismatch, match=r"\[2, vocabulary\].*\(3, 5\)"):
        scored_losses(torch.zeros(3, 5), labels)
    with pytest.raises(InvalidLabels, match="2 to 3, the vocabulary has 3"):
        scored_losses(torch.zeros(2, 3), labels)


def test_no_model_is_changed(task: Language):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    task.token_losses(model, task.collate(ROWS))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.get_output_embeddings()._forward_pre_hooks
