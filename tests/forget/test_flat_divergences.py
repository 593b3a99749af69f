from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.forget.language.flat_divergences import (
    DIVERGENCES,
    divergence_named,
    flat_loss,
    mean_probability,
)
from palimpsest.parts.tokens import IGNORED

GOOD = ("kl", "total-variation", "jensen-shannon", "pearson", "jeffrey")
REVERSED = ("reverse-kl", "squared-hellinger", "neyman")


def value(name, forgotten, template):
    return DIVERGENCES[name].loss(torch.tensor(template).double(), torch.tensor(forgotten).double()).item()


def slopes(name, forgotten, template):
    e, f = (torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in (template, forgotten))
    return [g.item() for g in torch.autograd.grad(DIVERGENCES[name].loss(e, f), [e, f])]


def test_five_of_eight_push_the_right_way():
    assert sorted(DIVERGENCES) == sorted((*GOOD, *REVERSED))
    assert [name for name, each in DIVERGENCES.items() if each.right_way] == list(GOOD)


@given(st.floats(0, 0.99), st.floats(0, 0.99))
@settings(deadline=None)
def test_the_loss_falls_with_the_template_and_with_less_of_the_forgotten_for_the_five_alone(f, e):
    for name in GOOD:
        to_template, to_forgotten = slopes(name, f, e)
        assert to_template < 0 < to_forgotten
    assert all(slopes(name, f, e)[0] > 0 for name in REVERSED)
    assert slopes("reverse-kl", f, e)[1] < 0


@given(st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_slopes_are_those_of_the_paper(f, e):
    for name, expected in {
        "total-variation": (-0.5 / math.cosh(e) ** 2, 0.5 / math.cosh(f) ** 2),
        "kl": (-1, math.exp(f - 1)),
        "pearson": (-1, 1 + f / 2),
        "jeffrey": (-1, 1 + f / 2 + 3 * f**2 / 16),
        "jensen-shannon": (-1 / (1 + math.exp(e)), 1 / (1 + math.exp(-f))),
    }.items():
        assert slopes(name, f, e) == pytest.approx(expected)


def test_the_loss_is_bounded_below_unlike_that_of_ascent():
    least = {"total-variation": -math.tanh(1) / 2, "kl": math.exp(-1) - 1, "pearson": -1, "jeffrey": -1}
    for name, bound in least.items():
        assert value(name, 0.0, 1.0) == pytest.approx(bound)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 1], [IGNORED, 2, 4, 0]])
    return torch.randn(2, 4, 6, generator=generator, requires_grad=True), labels


def test_probabilities_and_not_their_logarithms_are_averaged(batch):
    logits, labels = batch
    p = logits.softmax(-1)
    chosen = [p[0, 1, 3], p[0, 2, 1], p[1, 0, 2], p[1, 1, 4], p[1, 2, 0]]
    assert mean_probability(logits, labels).item() == pytest.approx(sum(chosen).item() / 5)
    assert mean_probability(logits, labels, "padded").item() == pytest.approx(sum(chosen).item() / 6)


def test_padding_shrinks_the_official_mean_and_not_ours(batch):
    logits, labels = batch
    longer = F.pad(logits, (0, 0, 0, 36)), F.pad(labels, (0, 36), value=IGNORED)
    assert mean_probability(*longer).item() == pytest.approx(mean_probability(logits, labels).item())
    ratio = mean_probability(*longer, "padded") / mean_probability(logits, labels, "padded")
    assert ratio.item() == pytest.approx(3 / 39)


def test_the_gradient_reaches_both_answers(batch):
    logits, labels = batch
    template = logits.detach().flip(0).requires_grad_()
    for name in GOOD:
        parts = torch.autograd.grad(flat_loss(logits, labels, template, labels, name), [logits, template])
        assert all(part.abs().sum() > 0 for part in parts)
        assert parts[0][0, 1, 3] > 0 > parts[1][0, 1, 3]  # descent: forget down, template up


def test_unknown_and_reversed_divergences_are_refused():
    with pytest.raises(UnknownName, match="jensen-shannon"):
        divergence_named("jenson-shannon")
    for name in REVERSED:
        with pytest.raises(InvalidHyperparameter, match="allow_reversed"):
            divergence_named(name)
        assert divergence_named(name, allow_reversed=True) is DIVERGENCES[name]


def test_rows_without_answer_and_batches_that_do_not_pair_are_refused(batch):
    logits, labels = batch
    empty = labels.clone()
    empty[1] = IGNORED
    with pytest.raises(InvalidRecords, match=r"\[1\]"):
        flat_loss(logits, labels, logits, empty)
    with pytest.raises(ModelMismatch, match="one template"):
        flat_loss(logits, labels, logits[:1], labels[:1])
    with pytest.raises(ModelMismatch):
        mean_probability(logits[:, :3], labels)
    with pytest.raises(InvalidHyperparameter, match="mean"):
        mean_probability(logits, labels, "mean")
