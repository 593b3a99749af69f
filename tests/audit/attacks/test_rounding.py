"""Rounding to few bits, against formulas by hand and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import palimpsest as pal
from palimpsest.audit.attacks.rounding import NF4_LEVELS, codes, quantize, quantize_model, quantize_nf4
from palimpsest.audit.attacks.weights import hidden_weights, matrix_weights
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.models import build_model

WEIGHTS = arrays(np.float64, (3, 5), elements=st.floats(-4, 4, allow_subnormal=False))
TASK = pal.tasks.Classification()


def test_three_bits_by_hand():
    weight = torch.tensor([[0.9, -0.3, 0.14, 0.16], [-2.0, 1.0, 0.0, 0.5]])
    # Row 1: D = 0.9 / 3 = 0.3; row 2: D = 2 / 3. Codes lie in [-4, 3].
    assert codes(weight, 3).tolist() == [[3, -1, 0, 1], [-3, 2, 0, 1]]
    expected = torch.tensor([[0.9, -0.3, 0.0, 0.3], [-2.0, 4 / 3, 0.0, 2 / 3]])
    assert torch.allclose(quantize(weight, 3), expected)


def test_the_papers_step_cuts_a_positive_maximum():
    weight = torch.tensor([[0.8, -0.4, 0.1, 0.3]])
    # D = 0.8 / 4 = 0.2, so 0.8 would be code 4 and becomes 3; -0.8 would be code -4.
    assert codes(weight, 3, "paper").tolist() == [[3, -2, 0, 2]]
    assert codes(-weight, 3, "paper").tolist() == [[-4, 2, 0, -2]]


@given(WEIGHTS, st.integers(2, 8))
def test_every_weight_goes_to_the_nearest_of_all_levels(values, bits):
    found = quantize(torch.from_numpy(values), bits).numpy()
    largest = np.abs(values).max(1, keepdims=True)
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))[None] * largest / (2 ** (bits - 1) - 1)
    nearest = np.abs(values[:, :, None] - levels[:, None]).min(2)
    assert np.abs(values - found) == pytest.approx(nearest, abs=1e-9)


@given(WEIGHTS, st.integers(2, 8))
def test_rounding_twice_changes_nothing_and_scale_does_not_matter(values, bits):
    weight = torch.from_numpy(values)
    once = quantize(weight, bits)
    assert torch.allclose(quantize(once, bits), once, atol=1e-12)
    assert torch.equal(codes(weight * 4, bits), codes(weight, bits))


@given(arrays(np.float32, (130,), elements=st.floats(-3, 3, width=32, allow_subnormal=False)))
def test_nf4_takes_the_nearest_level_of_the_block(values):
    found = quantize_nf4(torch.from_numpy(values).view(10, 13)).flatten().numpy()
    for start in range(0, 130, 64):
        block = values[start : start + 64]
        levels = np.array(NF4_LEVELS, np.float32) * np.abs(block).max()
        nearest = np.abs(block[:, None] - levels).min(1)
        assert np.abs(block - found[start : start + 64]) == pytest.approx(nearest, abs=1e-5)


def test_a_row_of_zeros_stays_zero():
    assert quantize(torch.zeros(2, 3), 4).eq(0).all() and quantize_nf4(torch.zeros(2, 3)).eq(0).all()


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32, 4.0, True])
def test_bits_outside_two_to_eight_are_refused(bits):
    with pytest.raises(InvalidHyperparameter, match="2 to 8"):
        codes(torch.ones(1, 2), bits)


def test_rows_of_a_convolution_are_its_output_channels():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    together = quantize(weight, 4)
    for channel in range(4):
        alone = quantize(weight[channel : channel + 1].flatten(1), 4).view(3, 3, 3)
        assert torch.equal(together[channel], alone)


def test_only_weights_below_the_head_are_rounded():
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_model(model, TASK, 3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    convolutions = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert changed == convolutions and "head.weight" not in changed


def test_tied_embeddings_and_attention_are_told_apart():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.decoder = nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight
            self.out = nn.Linear(4, 2)

    model = Tied()
    assert set(hidden_weights(model, TASK)) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert set(matrix_weights(model)) == {*hidden_weights(model, TASK), "decoder.weight", "out.weight"}
