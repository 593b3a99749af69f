from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFinite
from palimpsest.forget import projection as p

seeds = st.integers(0, 2**31 - 1)


def vectors(seed, count, dim=40):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def metric_of(seed, dim=40):
    """Entries over four orders of magnitude, as Adam's denominators have them."""
    return 10 ** (4 * torch.rand(dim, generator=torch.Generator().manual_seed(seed + 1)) - 4)


def cosine(one, two):
    return float(one.double() @ two.double() / (one.double().norm() * two.double().norm()))


# The basis


@given(seeds, st.integers(1, 8))
@settings(deadline=None)
def test_a_basis_is_orthonormal_and_spans_the_vectors(seed, count):
    given_vectors = vectors(seed, count)
    basis = p.orthonormal_basis(list(given_vectors))
    assert basis.dtype == torch.float32 and basis.shape == (count, 40)
    torch.testing.assert_close(basis @ basis.T, torch.eye(count), atol=1e-6, rtol=0)
    for vector in given_vectors:
        normal, tangential = p.decompose(vector, basis)
        assert normal.norm() <= 1e-5 * vector.norm()
        torch.testing.assert_close(normal + tangential, vector)


def test_nearly_parallel_vectors_still_give_an_orthogonal_basis():
    one, noise = vectors(0, 2)
    basis = p.orthonormal_basis([one, one + 1e-4 * noise, one - 3e-4 * noise.flip(0)])
    assert len(basis) == 3
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-5, rtol=0)


def test_repeated_and_zero_vectors_add_nothing_and_the_first_comes_first():
    one, two = vectors(1, 2)
    basis = p.orthonormal_basis([one, torch.zeros(40), -3 * one, two, one + two])
    assert len(basis) == 2
    assert cosine(basis[0], one) == pytest.approx(1)
    assert len(p.orthonormal_basis([torch.zeros(40)])) == 0


def test_gradients_so_small_that_their_squares_vanish_count():
    one, two = vectors(2, 2)
    basis = p.orthonormal_basis([one * 1e-30, two * 1e-25])
    torch.testing.assert_close(basis, p.orthonormal_basis([one, two]), atol=1e-6, rtol=0)


def test_half_precision_gradients_are_orthogonalised_in_single():
    stored = list(vectors(3, 4).bfloat16())
    basis = p.orthonormal_basis(stored)
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_enters_the_basis(value):
    bad = torch.ones(40)
    bad[7] = value
    with pytest.raises(NonFinite, match="gradient 1"):
        p.orthonormal_basis([torch.ones(40), bad])


def test_no_vectors_and_vectors_of_several_lengths_are_refused():
    with pytest.raises(InvalidHyperparameter, match="at least one"):
        p.orthonormal_basis([])
    with pytest.raises(ModelMismatch, match="one length"):
        p.orthonormal_basis([torch.ones(3), torch.ones(4)])


# The normal part


@given(seeds, st.integers(1, 8), st.booleans())
@settings(deadline=None)
def test_the_normal_part_is_orthogonal_to_every_protected_gradient_in_the_metric(seed, count, adam):
    forget, *retain = vectors(seed, count + 1)
    metric = metric_of(seed) if adam else None
    basis = p.orthonormal_basis([p.whiten(g, metric) for g in retain])
    normal, _ = p.decompose(p.whiten(forget, metric), basis)
    for g in retain:
        assert abs(cosine(p.whiten(g, metric), normal)) <= 1e-5
        # along the step that the optimiser takes, the retain loss is constant to first order
        assert abs(cosine(g, p.step_direction(normal, metric))) <= 1e-5


@given(seeds, st.integers(1, 8))
@settings(deadline=None)
def test_projecting_twice_is_projecting_once(seed, count):
    forget, *retain = vectors(seed, count + 1)
    basis = p.orthonormal_basis(retain)
    once, _ = p.decompose(forget, basis)
    twice, rest = p.decompose(once, basis)
    torch.testing.assert_close(twice, once, atol=1e-6, rtol=1e-6)
    assert rest.norm() <= 1e-6 * forget.norm()


def test_an_orthogonal_gradient_is_unchanged_and_a_parallel_one_vanishes():
    forget, retain = torch.zeros(40), torch.zeros(40)
    forget[:20], retain[20:] = vectors(5, 1)[0, :20], vectors(6, 1)[0, 20:]
    basis = p.orthonormal_basis([retain])
    assert torch.equal(p.decompose(forget, basis)[0], forget)
    assert p.decompose(-2.5 * retain, basis)[0].norm() <= 1e-6 * retain.norm()


def test_nothing_is_projected_out_where_nothing_is_protected():
    forget = vectors(7, 1)[0]
    basis = p.orthonormal_basis([torch.zeros(40)])
    assert torch.equal(p.decompose(forget, basis)[0], forget)


# The metric


def test_the_metric_is_the_denominator_of_adams_step():
    weight = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-2, betas=(0.0, 0.99), eps=1e-6)
    for seed in range(4):
        before = weight.detach().clone()
        weight.grad = vectors(seed, 1, 6)[0]
        optimizer.step()
    state = optimizer.state[weight]
    metric = p.adam_metric(state["exp_avg_sq"], int(state["step"]), 0.99, 1e-6)
    taken = (weight.detach() - before) / -1e-2
    # whitening is by the square root, so that back and forth it is the step of Adam
    torch.testing.assert_close(p.step_direction(p.whiten(weight.grad, metric), metric), taken)


@given(seeds)
@settings(deadline=None)
def test_whitening_makes_the_metric_the_identity_and_can_be_undone(seed):
    gradient, metric = vectors(seed, 1)[0], metric_of(seed)
    whitened = p.whiten(gradient, metric)
    torch.testing.assert_close(p.unwhiten(whitened, metric), gradient)
    direction = p.step_direction(whitened, metric)
    torch.testing.assert_close((direction * metric * direction).sum(), (whitened**2).sum(), rtol=1e-4, atol=0)
    assert torch.equal(p.whiten(gradient, None), gradient) and torch.equal(
        p.unwhiten(gradient, None), gradient
    )


def test_there_is_no_metric_before_the_first_step():
    for values, named in (((0, 0.999, 1e-8), "step"), ((1, 1.0, 1e-8), "beta2"), ((1, 0.9, -1.0), "eps")):
        with pytest.raises(InvalidHyperparameter, match=named):
            p.adam_metric(torch.ones(3), *values)


# Updates


@given(seeds, st.integers(1, 8))
@settings(deadline=None)
def test_pure_gu_moves_the_retain_loss_by_its_own_gradient_alone(seed, count):
    forget, *retain = vectors(seed, count + 1)
    basis = p.orthonormal_basis(retain)
    update = p.disentangled(forget, retain[0], basis, gamma=0.3, alpha=2.0)
    square = float(retain[0] @ retain[0])
    assert float(retain[0] @ update) == pytest.approx(2.0 * square, rel=1e-4)


@given(seeds, st.integers(1, 8))
@settings(deadline=None)
def test_the_joint_variant_without_kappa_is_pure_gu(seed, count):
    forget, *retain = vectors(seed, count + 1)
    basis = p.orthonormal_basis(retain)
    joint = p.jointly_disentangled(forget, retain[0], basis, 0.7, beta_rep=1.3, kappa=0)
    torch.testing.assert_close(
        joint, p.disentangled(forget, retain[0], basis, 0.7, 1.3), rtol=1e-4, atol=1e-5
    )


@given(seeds, st.floats(0.05, 3), st.integers(1, 8))
@settings(deadline=None)
def test_the_joint_variant_keeps_only_what_helps_both_up_to_kappa(seed, kappa, count):
    forget, *retain = vectors(seed, count + 1)
    basis = p.orthonormal_basis(retain)
    normal, _ = p.decompose(forget, basis)
    kept = p.jointly_disentangled(forget, retain[0], basis, beta_rep=0.0, kappa=kappa) - normal
    overlap = float(basis[0] @ forget)
    if float(forget @ retain[0]) > 0:
        size = min(overlap, kappa * float(normal.norm()))
        torch.testing.assert_close(kept, size * basis[0], rtol=1e-3, atol=1e-4)
    else:  # rounding noise of the others must not let them in
        assert kept.norm() <= 1e-5


def test_a_component_below_tau_is_not_kept():
    forget, retain = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])
    basis = p.orthonormal_basis([retain])
    kept = [
        p.jointly_disentangled(forget, retain, basis, beta_rep=0, tau=tau, kappa=9).tolist()
        for tau in (1.9, 2.1)
    ]
    assert kept == [[1.0, 1.0], [0.0, 1.0]]
    nothing_normal = p.jointly_disentangled(retain, retain, basis, beta_rep=0, kappa=9)
    assert nothing_normal.tolist() == [0.0, 0.0]
    for name in ("tau", "kappa"):
        with pytest.raises(InvalidHyperparameter, match=name):
            p.jointly_disentangled(forget, retain, basis, **{name: -1.0})


@given(seeds)
@settings(deadline=None)
def test_rank_one_in_closed_form_is_the_projection_and_pcgrad_only_acts_in_conflict(seed):
    forget, retain = vectors(seed, 2)
    assume(abs(cosine(forget, retain)) > 1e-3)
    gu, surgery = p.project_out(forget, retain), p.pcgrad(forget, retain)
    normal, _ = p.decompose(forget, p.orthonormal_basis([retain]))
    torch.testing.assert_close(gu.projected, normal, atol=1e-5, rtol=1e-4)
    assert abs(cosine(retain, gu.projected)) <= 1e-5
    conflict = float(forget @ retain) < 0
    assert gu.conflict == surgery.conflict == conflict
    assert torch.equal(surgery.projected, gu.projected if conflict else forget)
    effects = [abs(float(retain @ each.projected)) for each in (gu, surgery)]
    assert effects[0] <= effects[1] + 1e-4


def test_a_zero_retain_gradient_projects_nothing_out():
    forget = torch.ones(3)
    found = p.project_out(forget, torch.zeros(3))
    assert found.coefficient == 0 and torch.equal(found.projected, forget)
    with pytest.raises(ModelMismatch):
        p.project_out(forget, torch.ones(4))


def test_block_by_block_removes_more_than_the_condition_on_all_parameters_needs():
    forget, retain = vectors(8, 2)
    whole = p.project_out(forget, retain).projected
    blocks = torch.cat(
        [p.project_block(f, [r]) for f, r in zip(forget.split(10), retain.split(10), strict=True)]
    )
    assert abs(cosine(retain, blocks)) <= 1e-6
    assert blocks.norm() < whole.norm()
    oblique = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    ones = torch.tensor([1.0, 2.0])
    assert not torch.allclose(p.project_block(ones, oblique), p.project_block(ones, oblique[::-1]))
    assert torch.equal(p.project_block(ones, [torch.zeros(2)]), ones)


# What it does to a network


@pytest.fixture(scope="module")
def trained():
    """A small network that knows the digits well but not perfectly; 3 is to be forgotten."""
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float64) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x[y == 3], y[y == 3]), (x[y != 3], y[y != 3])


def loss_at(model, weights, data):
    found = functional_call(model, dict(zip(dict(model.named_parameters()), weights, strict=True)), data[0])
    return F.cross_entropy(found, data[1])


def test_a_small_step_of_gu_spares_the_retain_loss_and_still_forgets(trained):
    model, forget, retain = trained
    weights = [w.detach().requires_grad_() for w in model.parameters()]
    flat = torch.cat([w.flatten() for w in weights])

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).float()

    def change(direction, data):
        step = -1e-3 * flat.norm() * direction.double() / direction.double().norm()
        moved = [
            w + d.view_as(w) for w, d in zip(weights, step.split([w.numel() for w in weights]), strict=True)
        ]
        return (loss_at(model, moved, data) - loss_at(model, weights, data)).item()

    ascent, kept = gradient(-loss_at(model, weights, forget)), gradient(loss_at(model, weights, retain))
    assert p.entanglement(ascent, kept, p.orthonormal_basis([kept])).share > 0.01
    normal, _ = p.decompose(ascent, p.orthonormal_basis([kept]))
    assert abs(change(normal, retain)) <= 0.1 * abs(change(ascent, retain))
    assert change(normal, forget) >= 0.3 * change(ascent, forget) > 0


# Diagnostics


@given(seeds, st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_entangled_share_is_that_of_least_squares(seed, count):
    forget, *retain = vectors(seed, count + 1)
    basis = p.orthonormal_basis(retain)
    found = p.entanglement(forget, retain[0], basis)
    design = torch.stack(retain, 1).double()
    fit = design @ torch.linalg.lstsq(design, forget.double()[:, None]).solution
    assert found.share == pytest.approx(float((fit**2).sum() / (forget.double() ** 2).sum()), rel=1e-4)
    assert found.uncovered <= 1e-5
    assert found.cosine == pytest.approx(cosine(forget, retain[0]), abs=1e-5)


def test_a_stale_basis_shows_as_uncovered():
    forget, old, now = vectors(9, 3)
    assert p.entanglement(forget, now, p.orthonormal_basis([old])).uncovered > 0.8
    silent = p.entanglement(torch.zeros(40), torch.zeros(40), p.orthonormal_basis([old]))
    assert math.isnan(silent.cosine) and silent.share == silent.uncovered == 0
