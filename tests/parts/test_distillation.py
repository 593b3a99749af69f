from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.parts.distillation import feature_distance, js_divergence, kl_divergence

INF = float("inf")


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


shapes = st.tuples(st.integers(1, 5), st.integers(2, 6))
seeds = st.integers(0, 10_000)
temperatures = st.floats(0.2, 10)


@given(shapes, seeds, temperatures)
def test_kl_is_the_relative_entropy_of_the_softened_teacher_to_the_student(shape, seed, temperature):
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    p, q = (softmax(x.numpy() / temperature, axis=1) for x in (teacher, student))
    expected = entropy(p, q, axis=1)
    assert np.allclose(kl_divergence(student, teacher, temperature, "none"), expected, atol=1e-12)
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(expected.mean(), abs=1e-12)


@given(shapes, seeds, temperatures)
def test_reductions_differ_by_the_number_of_rows_and_classes(shape, seed, temperature):
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    total = kl_divergence(student, teacher, temperature, "none").sum().item()
    batchmean = kl_divergence(student, teacher, temperature, "batchmean").item()
    mean = kl_divergence(student, teacher, temperature, "mean").item()
    assert batchmean == pytest.approx(total / shape[0])
    assert mean == pytest.approx(total / (shape[0] * shape[1]))


def test_reductions_are_those_of_torch():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    elements = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none")
    assert kl_divergence(student, teacher, reduction="mean").item() == pytest.approx(elements.mean().item())
    assert kl_divergence(student, teacher).item() == pytest.approx(elements.sum().item() / 4)


def test_the_temperature_factor_is_added_only_when_asked():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    plain = kl_divergence(student, teacher, 3.0).item()
    assert kl_divergence(student, teacher, 3.0, square_temperature=True).item() == pytest.approx(9 * plain)


@given(seeds, temperatures)
def test_the_gradient_is_the_difference_of_the_softened_answers(seed, temperature):
    student, teacher = logits(3, 4, seed=seed).requires_grad_(), logits(3, 4, seed=seed + 1)
    kl_divergence(student, teacher, temperature, square_temperature=True).backward()
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / 3
    assert torch.allclose(student.grad, expected, atol=1e-10)


def test_a_class_without_logit_in_both_models_is_left_out_of_the_comparison():
    student, teacher = logits(3, 5), logits(3, 5, seed=1)
    expected = kl_divergence(student[:, 1:], teacher[:, 1:], 2.0)
    student, teacher = student.clone(), teacher.clone()
    student[:, 0] = teacher[:, 0] = -INF
    student.requires_grad_()
    found = kl_divergence(student, teacher, 2.0)
    found.backward()
    assert found.item() == pytest.approx(expected.item())
    assert torch.isfinite(student.grad).all() and (student.grad[:, 0] == 0).all()


def test_a_class_the_teacher_excludes_adds_nothing_and_one_only_the_student_excludes_is_infinitely_far():
    allowed, banned = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -INF]])
    assert kl_divergence(allowed, banned).item() == pytest.approx(np.log(2))
    assert kl_divergence(banned, allowed).item() == INF


def test_masked_rows_count_for_nothing_not_even_with_nan():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    mask = torch.tensor([True, False, True, True])
    expected = {
        name: kl_divergence(student[mask], teacher[mask], 2.0, name).clone() for name in ("mean", "batchmean")
    }
    student[1] = float("nan")
    student.requires_grad_()
    for name, value in expected.items():
        assert kl_divergence(student, teacher, 2.0, name, mask=mask).item() == pytest.approx(value.item())
    each = kl_divergence(student, teacher, 2.0, "none", mask=mask)
    assert each[1] == 0 and (each[mask] > 0).all()
    each.sum().backward()
    assert torch.isfinite(student.grad).all() and (student.grad[1] == 0).all()


def test_a_mask_without_any_row_gives_zero():
    student = logits(2, 3).requires_grad_()
    found = kl_divergence(student, logits(2, 3, seed=1), mask=torch.zeros(2, dtype=torch.bool))
    found.backward()
    assert found.item() == 0 and (student.grad == 0).all()


def test_token_positions_are_rows():
    student, teacher = logits(2, 3, 4), logits(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    flat = kl_divergence(student.reshape(6, 4), teacher.reshape(6, 4), mask=mask.reshape(6))
    assert kl_divergence(student, teacher, mask=mask).item() == pytest.approx(flat.item())
    assert kl_divergence(student, teacher, reduction="none").shape == (2, 3)


def test_feature_distance_is_the_squared_error():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    assert feature_distance(student, teacher).item() == pytest.approx(F.mse_loss(student, teacher).item())
    rows = feature_distance(student, teacher, "none")
    assert torch.allclose(rows, torch.cdist(student, teacher).diagonal() ** 2)
    assert feature_distance(student, teacher, "batchmean").item() == pytest.approx(rows.mean().item())


def test_normalised_feature_distance_sees_directions_only():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    cosine = F.cosine_similarity(student, teacher)
    assert torch.allclose(feature_distance(student, teacher, "none", normalise=True), 2 - 2 * cosine)
    assert feature_distance(3 * student, student, normalise=True).item() == pytest.approx(0, abs=1e-12)


@given(shapes, seeds)
def test_js_is_symmetric_bounded_and_agrees_with_scipy(shape, seed):
    p, q = logits(*shape, seed=seed).softmax(1), logits(*shape, seed=seed + 1).softmax(1)
    rows = js_divergence(p, q, "none")
    assert np.allclose(rows, jensenshannon(p.numpy(), q.numpy(), axis=1) ** 2, atol=1e-10)
    assert torch.allclose(rows, js_divergence(q, p, "none"))
    assert (rows <= np.log(2)).all() and (rows >= -1e-12).all()
    assert js_divergence(p, q).item() == pytest.approx(rows.mean().item())
    assert js_divergence(p, q, "mean").item() == pytest.approx(rows.mean().item() / shape[1])


def test_js_of_distributions_without_common_class_is_log_two_with_a_finite_gradient():
    p = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    found = js_divergence(p, torch.tensor([[0.0, 0.5, 0.5]]))
    found.backward()
    assert found.item() == pytest.approx(np.log(2)) and torch.isfinite(p.grad).all()


def test_js_from_the_mixture_is_the_other_direction():
    p, q = logits(4, 3).softmax(1), logits(4, 3, seed=1).softmax(1)
    m = (p + q) / 2
    expected = (entropy(m, p, axis=1) + entropy(m, q, axis=1)) / 2
    assert np.allclose(js_divergence(p, q, "none", from_mixture=True), expected)
    apart = js_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), from_mixture=True)
    assert apart.item() == INF


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    with pytest.raises(InvalidHyperparameter, match="temperature"):
        kl_divergence(logits(2, 3), logits(2, 3), temperature)


@pytest.mark.parametrize("distance", [kl_divergence, feature_distance, js_divergence])
def test_unknown_reductions_other_shapes_and_odd_masks_are_refused(distance):
    with pytest.raises(InvalidHyperparameter, match="'sum'"):
        distance(logits(2, 3), logits(2, 3), reduction="sum")
    with pytest.raises(ModelMismatch, match=r"\(2, 3\).*\(2, 4\)"):
        distance(logits(2, 3), logits(2, 4))
    with pytest.raises(ModelMismatch, match="mask"):
        distance(logits(2, 3), logits(2, 3), mask=torch.tensor([True]))
    with pytest.raises(ModelMismatch, match="mask"):
        distance(logits(2, 3), logits(2, 3), mask=torch.tensor([1.0, 0.0]))
