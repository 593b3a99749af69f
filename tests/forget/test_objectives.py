from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    InvalidRecords,
    ModelMismatch,
)
from palimpsest.forget import objectives as o
from palimpsest.forget.primal_dual import dual_update, flatness_loss, pdu_loss
from palimpsest.forget.steering import control_vector, draw_control_vector, state_distance
from palimpsest.parts.tokens import IGNORED, sequence_losses, token_counts, token_mean

LABELS = torch.tensor([[IGNORED, IGNORED, 3, 1, 5], [IGNORED, 2, 4, 0, IGNORED], [IGNORED, 1, 6, 2, 2]])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def logits(generator):
    return torch.randn(3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)


def losses_of(logits, labels=LABELS):
    return sequence_losses(logits, labels)


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def scored_rows(logits, labels=LABELS):
    """(log-probabilities [vocabulary], label) of every scored token, one by one."""
    log_p = logits.log_softmax(-1)
    return [
        (log_p[row, at - 1], int(labels[row, at]))
        for row in range(len(labels))
        for at in range(1, labels.shape[1])
        if labels[row, at] != IGNORED
    ]


# Gradient ascent and what is added to it


def test_ascent_is_minus_the_mean_over_tokens_and_not_over_rows(logits):
    ascent = o.gradient_ascent_loss(losses_of(logits), token_counts(LABELS))
    rows = scored_rows(logits)
    assert ascent.item() == pytest.approx(sum(log_p[label].item() for log_p, label in rows) / 10)
    assert ascent.item() == pytest.approx(-token_mean(logits, LABELS).item())


def test_the_weighted_sum_needs_no_retain_term():
    forget, retain = torch.tensor(2.0), torch.tensor(3.0)
    assert o.weighted(forget, retain, gamma=0.5, alpha=4.0).item() == 13.0
    assert o.weighted(forget, gamma=0.5).item() == 1.0


def test_kl_is_zero_between_equal_models_and_counts_only_the_chosen_positions(logits, generator):
    reference = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    assert o.kl_retain_loss(logits, logits).item() == pytest.approx(0, abs=1e-12)
    p, q = reference.softmax(-1), logits.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1)
    assert o.kl_retain_loss(logits, reference).item() == pytest.approx(by_hand.mean().item())
    mask = LABELS[:, 1:] != IGNORED
    assert o.kl_retain_loss(logits, reference, LABELS).item() == pytest.approx(
        by_hand[:, :-1][mask].mean().item()
    )


def test_a_joint_mean_lets_long_answers_outweigh_short_refusals():
    idk, kept = (torch.tensor([2.0]), torch.tensor([2])), (torch.tensor([27.0]), torch.tensor([9]))
    assert o.idk_nll_loss(*idk, *kept).item() == pytest.approx(1 + 3)
    assert o.idk_nll_loss(*idk, *kept, alpha=0.5).item() == pytest.approx(1 + 1.5)
    assert o.idk_nll_loss(*idk, *kept, reduction="joint").item() == pytest.approx(29 / 11)
    with pytest.raises(InvalidHyperparameter, match="alpha"):
        o.idk_nll_loss(*idk, *kept, alpha=0.5, reduction="joint")
    with pytest.raises(InvalidHyperparameter, match="both"):
        o.idk_nll_loss(*idk, *kept, reduction="both")


# Preferences


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_before_the_first_step_npo_and_dpo_are_two_over_beta_log_two(logits, beta):
    losses = losses_of(logits)
    start = 2 / beta * math.log(2)
    assert o.npo_loss(losses, losses.detach(), beta).item() == pytest.approx(start, rel=1e-12)
    chosen = losses.detach() + 1.0
    assert o.dpo_loss(chosen, chosen, losses, losses, beta).item() == pytest.approx(start, rel=1e-12)


def test_npo_with_a_small_beta_points_along_ascent_on_summed_losses(logits, generator):
    reference = losses_of(torch.randn(logits.shape, generator=generator, dtype=torch.float64))
    losses = losses_of(logits)
    npo, ascent = (
        gradient(value, logits).flatten() for value in (o.npo_loss(losses, reference, 1e-4), -losses.mean())
    )
    assert F.cosine_similarity(npo, ascent, dim=0) >= 0.99999
    torch.testing.assert_close(npo, ascent, rtol=1e-2, atol=1e-6)
    far = gradient(o.npo_loss(losses, reference, 20.0), logits).flatten()
    assert F.cosine_similarity(far, ascent, dim=0) < 0.99


@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.floats(0.1, 30)), min_size=1, max_size=5),
    st.floats(0.02, 1.0),
)
@settings(deadline=None)
def test_the_pull_of_npo_is_the_one_of_the_paper(pairs, beta):
    losses = torch.tensor([a for a, _ in pairs], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([b for _, b in pairs], dtype=torch.float64)
    loss = o.npo_loss(losses, reference, beta)
    (pull,) = torch.autograd.grad(loss, losses)
    p, p_ref = (-losses.detach()).exp() ** beta, (-reference).exp() ** beta
    torch.testing.assert_close(-pull * len(pairs), 2 * p / (p + p_ref), rtol=1e-8, atol=1e-12)
    assert loss > 0


def test_dpo_prefers_the_other_answer_and_npo_is_its_losing_side():
    lose, base = torch.tensor([4.0, 9.0]), torch.tensor([3.0, 5.0])
    indifferent = torch.zeros(2)
    npo = o.npo_loss(lose, base, 0.3)
    assert o.dpo_loss(indifferent, indifferent, lose, base, 0.3).item() == pytest.approx(npo.item())
    likelier = o.dpo_loss(base - 2, base, lose, base, 0.3)
    assert likelier < o.dpo_loss(base, base, lose, base, 0.3) < o.dpo_loss(base + 2, base, lose, base, 0.3)


def test_references_do_not_learn():
    losses, reference = (torch.tensor([3.0, 4.0], requires_grad=True) for _ in range(2))
    total = o.npo_loss(losses, reference) + o.dpo_loss(losses, reference, 2 * losses, reference)
    assert torch.autograd.grad(total, reference, allow_unused=True) == (None,)


def test_simnpo_looks_at_the_loss_per_token():
    counts = torch.tensor([2, 8])
    one = o.simnpo_loss(torch.tensor([1.0, 4.0]), counts, beta=2.5, delta=0.2)
    by_hand = -(2 / 2.5) * math.log(1 / (1 + math.exp(-2.5 * (0.5 - 0.2))))
    assert one.item() == pytest.approx(by_hand, rel=1e-6)
    assert o.simnpo_loss(torch.zeros(2), counts, beta=4.0).item() == pytest.approx(0.5 * math.log(2))
    with pytest.raises(InvalidRecords, match=r"rows \[1\]"):
        o.simnpo_loss(torch.tensor([1.0, 0.0]), torch.tensor([2, 0]))


# Weights and targets that are detached


def test_wga_with_exponent_zero_is_ascent_and_its_weights_are_constants(logits):
    ascent = o.gradient_ascent_loss(losses_of(logits), token_counts(LABELS))
    assert o.wga_loss(logits, LABELS, 0.0).item() == pytest.approx(ascent.item())
    rows = scored_rows(logits)
    fixed = sum(log_p[label].detach().exp() ** 2 * log_p[label] for log_p, label in rows) / len(rows)
    found = o.wga_loss(logits, LABELS, 2.0)
    torch.testing.assert_close(found, fixed)
    torch.testing.assert_close(gradient(found, logits), gradient(fixed, logits))
    live = sum(log_p[label].exp() ** 2 * log_p[label] for log_p, label in rows) / len(rows)
    assert not torch.allclose(gradient(found, logits), gradient(live, logits))


def test_satimp_weighs_by_saturation_and_importance_and_its_weights_are_constants(logits):
    rows = scored_rows(logits)

    def weight(log_p):
        return log_p.detach().exp() ** 3 * (1 - log_p.detach().exp()) ** 0.5

    fixed = sum(weight(log_p[label]) * log_p[label] for log_p, label in rows) / len(rows)
    found = o.satimp_loss(logits, LABELS, 3.0, 0.5)
    torch.testing.assert_close(found, fixed)
    torch.testing.assert_close(gradient(found, logits), gradient(fixed, logits))
    assert o.satimp_loss(logits, LABELS, 1.5, 0.0).item() == pytest.approx(
        o.wga_loss(logits, LABELS, 1.5).item()
    )


def test_satimp_of_a_certain_token_is_finite():
    sure = torch.full((1, 2, 3), -200.0)
    sure[..., 1] = 200.0
    sure.requires_grad_()
    loss = o.satimp_loss(sure, torch.tensor([[IGNORED, 1]]), 5.0, 1.0)
    assert loss.item() == 0 and torch.isfinite(gradient(loss, sure)).all()


def test_ceu_pulls_towards_ones_own_guess_without_the_truth(logits):
    rows = scored_rows(logits)
    firsts = {0, 3, 6}  # of the three answers
    total = 0.0
    for number, (log_p, label) in enumerate(rows):
        if number not in firsts:
            other = torch.arange(7) != label
            q = torch.where(other, log_p.detach().exp(), 0.0)
            total = total - (q / q.sum() * log_p).sum() / (len(rows) - 3)
    found = o.ceu_loss(logits, LABELS)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(gradient(found, logits), gradient(total, logits))
    assert gradient(found, logits)[0, 2, 1] > 0  # descent lowers the true token
    assert o.ceu_loss(logits, LABELS, skip=9).item() == 0


def test_undial_lowers_the_true_token_of_the_reference_and_ignores_prompts_and_padding(logits, generator):
    reference = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    found = o.undial_loss(logits, reference, LABELS, beta=4.0)
    rows = scored_rows(logits)
    scored_references = [
        reference[row, at - 1] for row in range(3) for at in range(1, 5) if LABELS[row, at] != IGNORED
    ]
    total = 0.0
    for (log_p, label), z in zip(rows, scored_references, strict=True):
        z = z - 4.0 * F.one_hot(torch.tensor(label), 7)
        total = total - (z.softmax(0) * log_p).sum() / len(rows)
    torch.testing.assert_close(found, total)
    slope = gradient(found, logits)
    unscored = F.pad(LABELS[:, 1:] == IGNORED, (0, 1), value=True)
    assert slope[unscored].abs().max() == 0 and slope[~unscored].abs().sum() > 0


@pytest.mark.parametrize("beta", [5.0, 30.0])
def test_the_minimum_of_undial_is_its_lowered_reference(generator, beta):
    reference = torch.randn(2, 3, 4, generator=generator)
    labels = torch.tensor([[IGNORED, 1, 2], [IGNORED, 0, 3]])
    target = reference.clone()
    for row in range(2):
        for at in (1, 2):
            target[row, at - 1, labels[row, at]] -= beta
    target.requires_grad_()
    assert gradient(o.undial_loss(target, reference, labels, beta), target).abs().max() < 1e-6


# Primal-dual


def test_flat_logits_have_no_height_and_as_released_the_mask_is_not_shifted(logits):
    assert flatness_loss(torch.full((3, 5, 7), 2.5), LABELS).item() == 0
    heights = (logits.max(-1).values - logits.mean(-1)) ** 2
    shifted = heights[:, :-1][LABELS[:, 1:] != IGNORED]
    assert flatness_loss(logits, LABELS).item() == pytest.approx(shifted.mean().item())
    unshifted = heights[LABELS != IGNORED]
    assert flatness_loss(logits, LABELS, as_released=True).item() == pytest.approx(unshifted.mean().item())


@given(st.lists(st.floats(0, 5), min_size=1, max_size=20), st.floats(0, 5), st.floats(0.01, 10))
@settings(deadline=None)
def test_the_multiplier_is_never_negative_and_grows_exactly_while_the_bound_is_broken(losses, bound, step):
    multiplier = 1.0
    for loss in losses:
        after = dual_update(multiplier, loss, bound, step)
        assert after >= 0
        assert after >= multiplier if loss > bound else after <= multiplier
        multiplier = after


def test_dual_ascent_finds_the_multiplier_of_a_constrained_minimum():
    """Minimise x subject to (x - 2)^2 <= 1: x = 1, multiplier 1/2."""
    x, multiplier = torch.tensor(3.0, requires_grad=True), 0.0
    for _ in range(3000):
        retain = (x - 2) ** 2
        (slope,) = torch.autograd.grad(pdu_loss(x, retain, multiplier, 1.0), x)
        x = (x - 0.02 * slope).detach().requires_grad_()
        multiplier = dual_update(multiplier, retain.item(), 1.0, 0.02)
    assert x.item() == pytest.approx(1.0, abs=1e-2) and multiplier == pytest.approx(0.5, abs=1e-2)


# Steering


def test_a_control_vector_has_the_length_asked_for_and_positive_entries(generator):
    drawn = draw_control_vector(16, 6.5, generator)
    assert drawn.norm().item() == pytest.approx(6.5, rel=1e-5) and (drawn >= 0).all()
    again = draw_control_vector(16, 6.5, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    torch.testing.assert_close(control_vector(torch.tensor([3.0, 4.0]), 10.0), torch.tensor([6.0, 8.0]))


def test_states_are_averaged_over_a_row_first_and_hidden_tokens_do_not_count(generator):
    states = torch.randn(2, 4, 3, generator=generator, requires_grad=True)
    mask = torch.tensor([[False, True, True, True], [False, False, False, True]])
    target = torch.ones(3)
    squares = ((states - target) ** 2).mean(-1)
    rows = [squares[0, 1:].mean(), squares[1, 3]]
    found = state_distance(states, target, mask)
    assert found.item() == pytest.approx(((rows[0] + rows[1]) / 2).item())
    assert gradient(found, states)[~mask].abs().max() == 0
    assert state_distance(states, target, mask, "token").item() == pytest.approx(squares[mask].mean().item())
    assert state_distance(states, target).item() == pytest.approx(squares.mean().item())
    released = torch.stack([squares[0, 1:].sum(), squares[1, 3]]).mean() * (1 / 3 + 1) / 2
    assert state_distance(states, target, mask, "released").item() == pytest.approx(released.item())


@given(st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_with_answers_of_one_length_all_reductions_agree(rows, length):
    states = torch.arange(rows * 6 * 2, dtype=torch.float64).view(rows, 6, 2).sin()
    mask = torch.zeros(rows, 6, dtype=torch.bool)
    mask[:, :length] = True
    found = [
        state_distance(states, torch.zeros(2), mask, r).item() for r in ("sequence", "token", "released")
    ]
    assert found == pytest.approx([found[0]] * 3)


# Bad input


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(beta, logits):
    losses, counts = torch.ones(2), torch.ones(2, dtype=torch.long)
    for call in (
        lambda: o.npo_loss(losses, losses, beta),
        lambda: o.dpo_loss(losses, losses, losses, losses, beta),
        lambda: o.simnpo_loss(losses, counts, beta),
        lambda: o.undial_loss(logits, logits, LABELS, beta),
    ):
        with pytest.raises(InvalidHyperparameter, match="beta"):
            call()


def test_rows_that_do_not_pair_are_refused():
    with pytest.raises(ModelMismatch, match="one length"):
        o.npo_loss(torch.ones(3), torch.ones(2))
    with pytest.raises(ModelMismatch, match="one length"):
        o.gradient_ascent_loss(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(InvalidRecords, match="empty"):
        o.npo_loss(torch.ones(0), torch.ones(0))


def test_other_vocabularies_and_unknown_tokens_are_refused(logits):
    other = torch.zeros(3, 5, 8)
    with pytest.raises(ModelMismatch, match="vocabulary"):
        o.undial_loss(logits, other, LABELS)
    with pytest.raises(ModelMismatch):
        o.kl_retain_loss(logits, other)
    high = LABELS.clone()
    high[0, 2] = 7
    for loss in (o.ceu_loss, o.wga_loss, o.satimp_loss, flatness_loss):
        with pytest.raises(InvalidLabels, match="vocabulary"):
            loss(logits, high)


def test_exponents_skips_and_multipliers_out_of_range_are_refused(logits):
    for call, named in (
        (lambda: o.wga_loss(logits, LABELS, -1), "beta"),
        (lambda: o.satimp_loss(logits, LABELS, -1, 1), "beta1"),
        (lambda: o.satimp_loss(logits, LABELS, 1, -1), "beta2"),
        (lambda: o.ceu_loss(logits, LABELS, -1), "skip"),
        (lambda: dual_update(-1, 0.5, 0.3, 1), "multiplier"),
        (lambda: dual_update(1, float("nan"), 0.3, 1), "finite"),
        (lambda: dual_update(1, 0.5, 0.3, 0), "step"),
        (lambda: control_vector(torch.ones(3), 0), "coefficient"),
        (lambda: control_vector(torch.zeros(3), 1), "zero"),
        (lambda: state_distance(torch.ones(1, 1, 2), torch.ones(2), reduction="sum"), "sum"),
    ):
        with pytest.raises(InvalidHyperparameter, match=named):
            call()


def test_states_without_tokens_or_of_other_shapes_are_refused():
    states, none = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(InvalidRecords, match=r"\[0, 1\]"):
        state_distance(states, torch.ones(4), none)
    with pytest.raises(ModelMismatch, match="target"):
        state_distance(states, torch.ones(5))
    with pytest.raises(ModelMismatch, match="mask"):
        state_distance(states, torch.ones(4), none[:, :2])
