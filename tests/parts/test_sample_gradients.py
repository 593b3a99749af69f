"""Norms of single gradients from one pass, against one backward pass per record."""

import pytest
import torch
from torch import nn

from palimpsest.parts.sample_gradients import sample_gradient_norms


def alone(model, losses_of, size, parameters):
    rows = []
    for record in range(size):
        found = torch.autograd.grad(losses_of(slice(record, record + 1)).sum(), parameters, allow_unused=True)
        rows.append([0.0 if g is None else float(g.double().norm()) for g in found])
    return torch.tensor(rows, dtype=torch.float64)


def llama(tied, padding=None):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            tie_word_embeddings=tied,
            pad_token_id=padding,
        )
    ).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("tokens", [6, 40])
def test_of_a_language_model(tied, padding, tokens):
    model = llama(tied, padding)
    ids = torch.randint(1, 8, (5, tokens), generator=torch.Generator().manual_seed(1))  # tokens come twice
    ids[0, -3:] = 0

    def losses(rows=slice(None)):
        logits = model(input_ids=ids[rows], use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[rows][:, 1:], reduction="none").mean(1)

    parameters = list(model.parameters())
    found = sample_gradient_norms(model, losses, parameters)
    torch.testing.assert_close(found, alone(model, losses, 5, parameters), rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(module._forward_hooks for module in model.modules())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last, self.unused = (
            nn.Linear(4, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 3),
            nn.Linear(2, 2),
        )

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def test_of_a_network_of_vectors_with_a_norm_and_a_part_that_is_not_reached():
    torch.manual_seed(0)
    model, x, y = Small(), torch.randn(7, 4), torch.arange(7) % 3

    def losses(rows=slice(None)):
        return nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")

    parameters = list(model.parameters())
    with torch.no_grad():
        found = sample_gradient_norms(model, losses, parameters)
    torch.testing.assert_close(found, alone(model, losses, 7, parameters), rtol=1e-4, atol=1e-6)
    assert (found[:, -2:] == 0).all()
    some = sample_gradient_norms(model, losses, parameters[2:4])
    torch.testing.assert_close(some, found[:, 2:4])


def test_what_cannot_be_taken_apart_is_left_to_the_caller():
    class Twice(Small):
        def forward(self, x):
            hidden = self.first(x)
            return self.last(self.norm(self.norm(hidden)))

    class Own(Small):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return super().forward(x) + self.shift

    class Mixed(Small):
        def forward(self, x):
            return self.last(self.norm(self.first(x.mean(0, keepdim=True)))).expand(len(x), -1)

    x = torch.randn(5, 4)
    for model in (Twice(), Mixed()):
        assert (
            sample_gradient_norms(model, lambda m=model: m(x).square().sum(1), list(model.parameters()))
            is None
        )
    model = Own()
    found = sample_gradient_norms(model, lambda: model(x).square().sum(1), list(model.parameters()))
    torch.testing.assert_close(
        found,
        alone(model, lambda rows: model(x[rows]).square().sum(1), 5, list(model.parameters())),
        rtol=1e-4,
        atol=1e-6,
    )


def test_positions_that_are_read_once_for_all_records_are_left_to_the_caller():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    ids = torch.randint(0, 20, (3, 5))
    losses = lambda: model(input_ids=ids).logits.square().mean((1, 2))  # noqa: E731
    assert sample_gradient_norms(model, losses, list(model.parameters())) is None
