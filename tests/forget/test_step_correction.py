from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFinite
from palimpsest.forget import step_correction
from palimpsest.forget.step_correction import corrected_step, largest_safe_scale

seeds = st.integers(0, 2**31 - 1)


def problem(seed, count, dim=30, adam=True):
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(dim, generator=generator, dtype=torch.float64)
    gradients = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    metric = 10 ** (3 * torch.rand(dim, generator=generator, dtype=torch.float64) - 3)
    return step, gradients, metric if adam else torch.ones(dim, dtype=torch.float64)


def harm(step, gradients):
    """Largest cosine of the step with a gradient."""
    return float((gradients @ step / gradients.norm(dim=1)).max() / step.norm())


def by_nnls(step, gradients, metric):
    """The same step from its dual, non-negative least squares of the whitened step on whitened gradients."""
    root = metric.sqrt().numpy()
    multipliers, _ = nnls((gradients.numpy() / root).T, step.numpy() * root, maxiter=10_000)
    return step - torch.from_numpy(gradients.numpy().T @ multipliers) / metric


@given(seeds, st.integers(1, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_corrected_step_is_the_nearest_harmless_one(seed, count, adam):
    step, gradients, metric = problem(seed, count, adam=adam)
    found = corrected_step(step, gradients, metric if adam else None)
    torch.testing.assert_close(found.step, by_nnls(step, gradients, metric), rtol=1e-6, atol=1e-8)
    assert harm(found.step, gradients) <= 1e-9
    assert min(found.multipliers) >= 0


@given(seeds, st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_held_back_gradients_are_orthogonal_to_the_step(seed, count):
    step, gradients, metric = problem(seed, count)
    found = corrected_step(step, gradients, metric)
    for multiplier, gradient in zip(found.multipliers, gradients, strict=True):
        if multiplier > 1e-9:
            assert abs(harm(found.step, gradient[None])) <= 1e-9


@given(seeds, st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_equalities_make_the_step_orthogonal_to_every_gradient(seed, count):
    step, gradients, metric = problem(seed, count)
    found = corrected_step(step, gradients, metric, equality=True)
    assert max(abs(harm(found.step, g[None])) for g in gradients) <= 1e-9
    inverse = gradients / metric
    by_hand = step - inverse.T @ torch.linalg.solve(inverse @ gradients.T, gradients @ step)
    torch.testing.assert_close(found.step, by_hand, rtol=1e-6, atol=1e-8)


@given(seeds, st.integers(1, 9), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_all_active_sets_and_their_exchange_give_the_same_step(seed, count, dim):
    step, gradients, metric = problem(seed, count, dim)  # more gradients than dimensions, too
    expected = by_nnls(step, gradients, metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_correction, "_by_exchange", lambda *_: None)
        enumerated = corrected_step(step, gradients, metric).step
    for found in (enumerated, corrected_step(step, gradients, metric).step):
        assert (metric * (found - expected) ** 2).sum() <= 1e-12 * (metric * step**2).sum()


def test_a_harmless_step_is_untouched():
    step, gradients, metric = problem(0, 5)
    gradients = -gradients * (gradients @ step).sign()[:, None]
    found = corrected_step(step, gradients, metric)
    assert found.step is step and found.ratio == 0 and found.multipliers == (0.0,) * 5


def test_correcting_twice_is_correcting_once():
    step, gradients, metric = problem(1, 9)
    once = corrected_step(step, gradients, metric)
    twice = corrected_step(once.step, gradients, metric)
    torch.testing.assert_close(twice.step, once.step, rtol=1e-9, atol=1e-12)
    assert once.ratio == pytest.approx(float((once.step - step).norm() / step.norm()))


def test_repeated_dependent_and_zero_gradients_change_nothing():
    step, gradients, metric = problem(2, 3)
    plain = corrected_step(step, gradients, metric).step
    more = torch.cat([gradients, torch.zeros(1, 30), 5 * gradients[:2], gradients[:1] + gradients[1:2]])
    for equality in (False, True):
        plain = corrected_step(step, gradients, metric, equality).step
        torch.testing.assert_close(
            corrected_step(step, more, metric, equality).step, plain, rtol=1e-6, atol=1e-8
        )


def test_opposite_gradients_leave_only_what_is_orthogonal_to_both():
    step, gradients, metric = problem(3, 1)
    found = corrected_step(step, torch.cat([gradients, -gradients]), metric)
    assert abs(harm(found.step, gradients)) <= 1e-9


def test_a_step_that_only_harms_becomes_none():
    gradient = torch.tensor([[3.0, -4.0]])
    assert corrected_step(gradient[0] * 0.1, gradient).step.abs().max() <= 1e-7
    nothing = corrected_step(torch.zeros(2), gradient)
    assert nothing.ratio == 0 and nothing.step.tolist() == [0, 0]


def test_single_precision_steps_come_back_in_single_precision_and_do_no_harm():
    step, gradients, metric = problem(4, 9, dim=5000)
    found = corrected_step(step.float() * 1e-4, gradients.float() * 1e-6, metric.float() * 1e-5)
    assert found.step.dtype == torch.float32
    assert harm(found.step.double(), gradients) <= 1e-6


def test_the_result_does_not_depend_on_the_pieces_it_is_computed_in(monkeypatch):
    step, gradients, metric = problem(5, 6, dim=101)
    whole = corrected_step(step, gradients, metric)
    monkeypatch.setattr(step_correction, "_CHUNK", 10)
    torch.testing.assert_close(corrected_step(step, gradients, metric).step, whole.step)


def test_adamw_re_entangles_a_projected_gradient_and_the_correction_undoes_it():
    """Momentum and weight decay: projecting the gradient does not project the step."""
    from palimpsest.forget.projection import adam_metric, decompose, orthonormal_basis, unwhiten, whiten

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, generator=generator, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1)
    entangled, realised = [], []
    for number in range(12):
        forget, retain = torch.randn(2, 200, generator=generator)
        state = optimizer.state[weight]
        metric = adam_metric(state["exp_avg_sq"], int(state["step"])) if number else None
        basis = orthonormal_basis([whiten(retain, metric)])
        weight.grad = unwhiten(decompose(whiten(forget, metric), basis)[0], metric)
        before = weight.detach().clone()
        optimizer.step()
        proposed = weight.detach() - before
        metric = adam_metric(optimizer.state[weight]["exp_avg_sq"], number + 1)
        step = corrected_step(proposed, retain[None], metric, equality=True).step
        entangled.append(abs(harm(proposed.double(), retain.double()[None])))
        realised.append(abs(harm(step.double(), retain.double()[None])))
    assert sum(cosine > 1e-3 for cosine in entangled) >= 9
    assert max(realised) <= 1e-6


# The finite step


def test_the_scale_is_halved_until_the_rise_fits_the_budget():
    asked = []

    def rise(scale):
        asked.append(scale)
        return scale**2

    assert largest_safe_scale(rise, budget=0.1) == 0.25
    assert asked == [1.0, 0.5, 0.25]
    assert largest_safe_scale(lambda scale: 1.0, budget=0.1, halvings=3) == 0.0
    assert largest_safe_scale(lambda scale: float("nan")) == 0.0
    with pytest.raises(InvalidHyperparameter, match="budget"):
        largest_safe_scale(rise, budget=-1)


# Bad input


def test_too_many_gradients_and_impossible_metrics_are_refused():
    with pytest.raises(InvalidHyperparameter, match="At most 9"):
        corrected_step(torch.ones(4), torch.ones(10, 4))
    for value in (0.0, -1.0, float("nan")):
        metric = torch.ones(4)
        metric[2] = value
        with pytest.raises(InvalidHyperparameter, match="metric"):
            corrected_step(torch.ones(4), torch.ones(1, 4), metric)


def test_shapes_that_differ_and_values_that_are_not_finite_are_refused():
    with pytest.raises(ModelMismatch, match="constraints"):
        corrected_step(torch.ones(4), torch.ones(1, 5))
    with pytest.raises(ModelMismatch, match="metric"):
        corrected_step(torch.ones(4), torch.ones(1, 4), torch.ones(3))
    with pytest.raises(NonFinite):
        corrected_step(torch.ones(4), torch.tensor([[1.0, np.nan, 0.0, 0.0]]))
    with pytest.raises(NonFinite):
        corrected_step(torch.tensor([np.inf, 0.0]), torch.ones(1, 2))
