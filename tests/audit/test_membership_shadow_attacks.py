"""LiRA, RMIA, the one-run bound and the challenge score: brute force, closed forms, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from palimpsest.audit.membership.challenge import CAP, challenge_score, forgetting_score, record_epsilons
from palimpsest.audit.membership.lira import fit_gaussians, lira_offline, lira_online
from palimpsest.audit.membership.one_run import one_run_epsilon, one_run_p_value
from palimpsest.audit.membership.rmia import rmia, tune_offline_a
from palimpsest.audit.membership.ulira import Statistic, play, play_against_retrained, population_auc
from palimpsest.audit.shadow import paired_halves
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import auc


def shadows(models: int = 16, records: int = 300, gap: float = 2.0, seed: int = 0):
    """phi = record's own level (spread 4) + gap if trained on it + noise of 1: only a per-record attack sees it."""
    random = np.random.default_rng(seed)
    inside = paired_halves(records, models, random)
    phi = random.normal(0, 4, records) + gap * inside + random.normal(0, 1, (models, records))
    return phi, inside


def test_online_lira_agrees_with_its_definition_record_by_record():
    phi, inside = shadows(8, 20)
    target = phi[0][:, None]
    found = lira_online(target, phi[1:][:, :, None], inside[1:])
    fewest_in, fewest_out = inside[1:].sum(0).min(), (~inside[1:]).sum(0).min()
    for record in range(20):
        mine, theirs = phi[1:, record][inside[1:, record]], phi[1:, record][~inside[1:, record]]
        mine, theirs = mine[:fewest_in], theirs[:fewest_out]
        expected = stats.norm.logpdf(target[record, 0], np.median(mine), mine.std() + 1e-30)
        expected -= stats.norm.logpdf(target[record, 0], np.median(theirs), theirs.std() + 1e-30)
        assert found[record] == pytest.approx(expected)


def test_lira_sees_what_the_population_attack_cannot():
    phi, inside = shadows()
    target, truth = phi[15], inside[15]
    plain = auc(target[truth], target[~truth])
    for attack, least in ((lira_online, 0.85), (lira_offline, 0.8)):
        score = attack(target[:, None], phi[:14][:, :, None], inside[:14], "pooled")
        assert auc(score[truth], score[~truth]) > max(least, plain + 0.15)


def test_the_pooled_deviation_is_that_of_the_noise_and_the_global_one_is_not():
    phi, inside = shadows(64)
    pooled = fit_gaussians(phi[:, :, None], inside, "pooled").deviation
    overall = fit_gaussians(phi[:, :, None], inside, "global").deviation
    assert pooled[0, 0] == pytest.approx(1, rel=0.05)
    assert overall[0, 0] > 3


def test_the_released_offline_score_is_two_sided_and_ours_is_not():
    phi, inside = shadows()
    mean = fit_gaussians(phi[:, :, None], ~inside, "pooled").mean
    low, high = mean - 5, mean + 5
    ours = [lira_offline(target, phi[:, :, None], inside, "pooled") for target in (low, mean, high)]
    released = [
        lira_offline(target, phi[:, :, None], inside, "pooled", as_released=True)
        for target in (low, mean, high)
    ]
    assert (ours[0] < ours[1]).all() and (ours[1] < ours[2]).all()
    np.testing.assert_allclose(released[0], released[2])
    assert (released[0] > released[1]).all()


def test_the_released_fixed_variance_takes_the_deviation_of_trained_models_twice():
    phi, inside = shadows(8, 30)
    target = phi[0][:, None]
    released = lira_online(target, phi[:, :, None], inside, "global", as_released=True)
    own, other = (fit_gaussians(phi[:, :, None], which, "global") for which in (inside, ~inside))
    expected = stats.norm.logpdf(target, own.mean, own.deviation) - stats.norm.logpdf(
        target, other.mean, own.deviation
    )
    np.testing.assert_allclose(released, expected[:, 0])


def test_a_record_with_fewer_than_two_models_a_side_is_refused():
    phi, inside = shadows(6, 10)
    inside = inside.copy()
    inside[:, 3] = True
    inside[0, 3] = False
    with pytest.raises(InvalidAudit, match="too few for records 3"):
        lira_online(phi[0][:, None], phi[:, :, None], inside)


def test_unusable_lira_input_is_refused():
    phi, inside = shadows(6, 10)
    with pytest.raises(InvalidAudit, match="got"):
        lira_online(phi[0], phi[:, :, None], inside)
    with pytest.raises(InvalidAudit, match=r"got \(10, 1\)"):
        lira_offline(phi[0][:, None], phi[:, :5, None], inside)
    with pytest.raises(InvalidAudit, match="true or false"):
        lira_online(phi[0][:, None], phi[:, :, None], inside.astype(int))
    with pytest.raises(InvalidAudit, match="NaN or infinity"):
        lira_online(np.full((10, 1), np.nan), phi[:, :, None], inside)


def rmia_inputs(models: int = 6, records: int = 40, population: int = 60, seed: int = 0):
    random = np.random.default_rng(seed)
    inside = paired_halves(records, models, random)
    draw = random.uniform
    return (
        draw(size=records),
        draw(size=(models, records)),
        inside,
        draw(size=population),
        draw(size=(models, population)),
    )


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_rmia_agrees_with_the_table_of_all_pairs(gamma: float):
    target, references, inside, population, others = rmia_inputs()
    found = rmia(target, references, inside, population, others, a=0.4, gamma=gamma)
    for record in range(len(target)):
        out = references[~inside[:, record], record].mean()
        ratio = target[record] / (0.7 * out + 0.3)
        ratios = population / (0.7 * others.mean(0) + 0.3)
        assert found[record] == pytest.approx((ratio / ratios > gamma).mean())


def test_the_released_rmia_lets_zeros_into_the_mean_where_few_models_are_out():
    target, references, inside, population, others = rmia_inputs()
    target[0], references[:, 0] = 0.5, 0.5
    inside = inside.copy()
    inside[:, 0] = [True, True, True, True, True, False]
    ours = rmia(target, references, inside, population, others)
    released = rmia(target, references, inside, population, others, as_released=True)
    assert released[0] > ours[0]


def test_rmia_tells_members_and_its_constant_is_tuned_without_the_target():
    phi, inside = shadows(10, 400, gap=2.0)
    random = np.random.default_rng(1)
    level = random.normal(0, 4, 400)
    z = 1 / (1 + np.exp(-(level + random.normal(0, 1, (10, 400)))))
    p = 1 / (1 + np.exp(-phi))
    a = tune_offline_a(p[1:6], inside[1:6], z[1:6])
    score = rmia(p[0], p[2:6], inside[2:6], z[0], z[2:6], a)
    plain = auc(p[0][inside[0]], p[0][~inside[0]])
    assert auc(score[inside[0]], score[~inside[0]]) > plain + 0.08
    assert 0 <= a <= 1


def test_unusable_rmia_input_is_refused():
    target, references, inside, population, others = rmia_inputs()
    with pytest.raises(InvalidAudit, match="target"):
        rmia(target[:-1], references, inside, population, others)
    with pytest.raises(InvalidAudit, match="population"):
        rmia(target, references, inside, population, others[:-1])
    with pytest.raises(InvalidAudit, match=r"\[0, 1\]"):
        rmia(target + 1, references, inside, population, others)
    with pytest.raises(InvalidAudit, match=r"a in \[0, 1\]"):
        rmia(target, references, inside, population, others, a=1.5)
    with pytest.raises(InvalidAudit, match="at least one record"):
        rmia(target, references, inside, population[:0], others[:, :0])
    everywhere = inside.copy()
    everywhere[:, 7] = True
    with pytest.raises(InvalidAudit, match="without records 7"):
        rmia(target, references, everywhere, population, others)


def test_perfect_guesses_bound_epsilon_as_the_closed_form_says():
    # All r right: q^r = p, so e^epsilon = p^(1/r) / (1 - p^(1/r)).
    q = 0.05 ** (1 / 40)
    assert one_run_epsilon(100, 40, 40) == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


def test_guesses_at_chance_prove_nothing_and_delta_costs():
    assert one_run_epsilon(100, 60, 30) == 0
    assert one_run_p_value(100, 60, 45, 1.0, 1e-3) > one_run_p_value(100, 60, 45, 1.0)
    assert one_run_epsilon(200, 40, 38, 1e-3) < one_run_epsilon(200, 40, 38)


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon", "delta"),
    [(10, 11, 5, 1, 0), (10, 5, 6, 1, 0), (10, 5, 5, -1, 0), (10, 5, 5, 1, 2)],
)
def test_impossible_guesses_are_refused(m: int, r: int, v: int, epsilon: float, delta: float):
    with pytest.raises(InvalidAudit):
        one_run_p_value(m, r, v, epsilon, delta)
    with pytest.raises(InvalidAudit, match="significance"):
        one_run_epsilon(10, 5, 5, p=1.5)


def test_the_challenge_score_orders_good_and_bad_unlearning():
    random = np.random.default_rng(0)
    retrained = random.normal(0, 1, (64, 20))
    good = forgetting_score(random.normal(0, 1, (64, 20)), retrained)
    weak = forgetting_score(random.normal(1.5, 1, (64, 20)), retrained)
    bad = forgetting_score(random.normal(20, 1, (64, 20)), retrained)
    assert good > weak > bad == 0
    assert challenge_score(good, 0.9, 0.8, 1.0, 0.8) == pytest.approx(0.9 * good)


def test_separated_spiked_and_identical_records_get_the_cap_the_cap_and_nothing():
    random = np.random.default_rng(0)
    retrained = np.column_stack([random.normal(0, 1, 20), random.normal(0, 1, 20), np.ones(20)])
    unlearned = np.column_stack([random.normal(30, 1, 20), np.full(20, 0.5), np.ones(20)])
    assert record_epsilons(unlearned, retrained).tolist() == [CAP, CAP, 0.0]


def test_unusable_challenge_input_is_refused():
    with pytest.raises(InvalidAudit, match="at least 3"):
        record_epsilons(np.zeros((2, 4)), np.zeros((2, 4)))
    with pytest.raises(InvalidAudit, match="as many"):
        record_epsilons(np.zeros((5, 4)), np.zeros((6, 4)))
    with pytest.raises(InvalidAudit, match="NaN"):
        record_epsilons(np.full((5, 4), np.nan), np.zeros((5, 4)))
    with pytest.raises(InvalidAudit, match="above 0"):
        challenge_score(1.0, 1.0, 1.0, 0.0, 1.0)


def test_ulira_finds_what_is_left_and_is_at_chance_where_nothing_is():
    phi, inside = shadows(24, 200)
    left = play(phi, inside)
    assert left.accuracy.value > 0.8 and left.auc.value > 0.9
    assert left.auc.value > population_auc(phi, inside).value + 0.15
    gone, _ = shadows(24, 200, gap=0.0, seed=1)
    nothing = play(gone, inside)
    assert nothing.accuracy.value == pytest.approx(0.5, abs=0.05)
    assert nothing.tpr is not None and nothing.tpr.value < 0.05


def test_the_game_against_retrained_models_also_counts_what_the_method_did_elsewhere():
    phi, inside = shadows(24, 200, gap=0.0)
    retrained, _ = shadows(24, 200, gap=0.0)
    shifted = play_against_retrained(phi + 2.0, retrained, inside)
    assert play(phi + 2.0, inside).accuracy.value < 0.56
    assert shifted.accuracy.value > 0.8


def test_the_error_of_a_statistic_covers_its_spread_between_repetitions():
    results = [
        play(shadows(12, 100, gap=0.0, seed=seed)[0], shadows(12, 100, seed=seed)[1]) for seed in range(40)
    ]
    spread = np.std([result.accuracy.value for result in results])
    claimed = np.mean([result.accuracy.error for result in results])
    assert 0.6 * spread < claimed < 1.7 * spread
    assert np.mean([result.accuracy.value for result in results]) == pytest.approx(0.5, abs=0.01)


def test_a_statistic_without_spread_has_no_error_and_keeps_its_interval_in_range():
    flat = Statistic(np.full((6, 10), 0.5))
    assert flat.error == 0 and flat.interval == (0.5, 0.5)
    assert Statistic(np.eye(10) * 0.1 + 0.95).interval[1] <= 1


def test_too_few_never_trained_records_leave_the_rate_open():
    phi, inside = shadows(12, 100)
    assert play(phi, inside).tpr is None
