"""The shadow audit on real models, and the card's claims at small scale."""

from __future__ import annotations

import numpy as np
import pytest

import palimpsest as pal
from palimpsest.audit.membership.lira import lira_online
from palimpsest.audit.membership.rates import auc, tpr_at
from palimpsest.audit.membership.rmia import rmia, tune_offline_a
from palimpsest.audit.membership.shadow_audit import ShadowMembership
from palimpsest.audit.shadow import observed, paired_halves, train_shadow
from palimpsest.core.errors import InvalidAudit, MissingNeed, UnknownName
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement, Outcome
from palimpsest.core.runtime import Runtime
from palimpsest.parts.training import TrainingRecipe
from tests.audit.membership_data import RECIPE, Identity, RetainTuning, noisy_digits, small_mlp


def request(seed: int = 0, count: int = 800) -> pal.ForgetSplit:
    return pal.split(
        noisy_digits(seed, count), forget=pal.by_fraction(0.25, seed=seed), test=0.25, holdout=0.25, seed=seed
    )


def models(split: pal.ForgetSplit, task, recipe: TrainingRecipe = RECIPE, seed: int = 0):
    original = pal.train(small_mlp(seed), split.train, task=task, seed=seed, recipe=recipe)
    return original, [pal.forget(original, split, "retrain", task, seed=seed + 1)]


def fresh(evidence: Evidence) -> Evidence:
    """The same models without anything that is remembered of them."""
    return Evidence(
        evidence.unlearned,
        evidence.split,
        evidence.task,
        evidence.runtime,
        evidence.original,
        evidence.controls,
    )


def values(outcome: Outcome) -> dict[str, float | None]:
    return {finding.name: finding.value for finding in outcome.findings}


@pytest.fixture(scope="module")
def quick(digits_task):
    split = request(count=240)
    original, controls = models(split, digits_task, TrainingRecipe(epochs=20, lr=3e-3, batch_size=32))
    return split, original, controls


def test_the_untouched_model_is_at_k_1_exactly(quick, digits_task):
    split, original, controls = quick
    report = pal.audit(
        original,
        split,
        digits_task,
        original=original,
        retrained=controls,
        audits=[ShadowMembership(method=Identity(), runs=8)],
    )
    findings = [finding for finding in report.findings if finding.audit == "shadow-membership"]
    assert {f.name for f in findings} >= {"ulira_accuracy", "online_auc", "offline_auc", "rmia_auc"}
    for finding in findings:
        if finding.name == "ulira_tpr_at_0.01":
            assert finding.judgement == Judgement.INVALID and finding.value is None
        elif finding.name != "population_auc":
            assert finding.value == finding.original
            assert finding.k in (1, None)
    assert report.finding("shadow-membership.ulira_accuracy").k == 1
    assert report.finding("shadow-membership.online_auc").bears == "outputs"


def test_a_killed_audit_goes_on_and_ends_the_same(quick, digits_task, tmp_path):
    split, original, controls = quick
    evidence = Evidence(original, split, digits_task, Runtime(), original, controls)
    undisturbed = ShadowMembership(method="retrain", runs=6).run(evidence)
    kept = ShadowMembership(method="retrain", runs=6, folder=tmp_path)
    kept.run(fresh(evidence))
    for place in sorted(tmp_path.glob("*.json"))[::3]:
        place.unlink()
    assert kept.run(fresh(evidence)) == undisturbed


def test_without_a_holdout_only_the_method_is_judged(quick, digits_task):
    split, original, controls = quick
    bare = pal.ForgetSplit(split.forget, split.retain)
    evidence = Evidence(original, bare, digits_task, Runtime(), original, controls)
    outcome = ShadowMembership(method=Identity(), runs=6, targets=20).run(evidence)
    found = values(outcome)
    assert found["ulira_accuracy"] is not None
    assert found["lira_auc"] is None and found["rmia_auc"] is None
    assert {finding.judgement for finding in outcome.findings if finding.value is None} == {
        Judgement.NOT_RUN,
        Judgement.INVALID,
    }


def test_it_is_not_run_unless_asked_for(quick, digits_task):
    split, original, _ = quick
    report = pal.audit(original, split, digits_task, audits=["membership"])
    finding = report.finding("shadow-membership.audit")
    assert finding.judgement == Judgement.NOT_RUN and finding.note == "not asked for"


def test_bad_settings_are_refused_before_any_work(quick, digits_task):
    split, original, controls = quick
    evidence = Evidence(original, split, digits_task, Runtime(), original, controls)
    with pytest.raises(InvalidAudit, match="must know the method"):
        pal.audit(original, split, digits_task, audits=["shadow-membership"])
    for runs, targets in ((4, 10), (7, 10), (6, 1)):
        with pytest.raises(InvalidAudit, match="even number of runs"):
            ShadowMembership(method="retrain", runs=runs, targets=targets)
    with pytest.raises(UnknownName, match="retrain"):
        ShadowMembership(method="retrian").run(evidence)
    with pytest.raises(UnknownName, match="recipe"):
        ShadowMembership(method="retrain", settings={"recip": None}).run(evidence)
    with pytest.raises(InvalidAudit, match="training recipe"):
        ShadowMembership(method=Identity()).run(Evidence(small_mlp(), split, digits_task))


def test_a_method_whose_needs_shadows_cannot_meet_is_refused(quick, digits_task):
    from dataclasses import dataclass

    from palimpsest.core.needs import Need
    from palimpsest.core.unlearner import unlearner

    @unlearner("test-needs-hooks", needs={Need.TRAINING_HOOKS})
    @dataclass(frozen=True)
    class Hooked:
        """Needs what only training can give."""

        def unlearn(self, model, split, task, runtime):
            return model

    split, original, controls = quick
    with pytest.raises(MissingNeed, match="training-hooks"):
        ShadowMembership(method=Hooked()).run(
            Evidence(original, split, digits_task, Runtime(), original, controls)
        )


@pytest.mark.slow
def test_shadow_attacks_beat_the_loss_attack_by_the_cards_margins(digits_task):
    # Card mia, claims 1 and 2; measured with seeds 0 to 2: loss AUC .59 to .60, online .74 to .76 and TPR at
    # 1 % of .15 to .20 against .007 to .028, RMIA with 4 references .71 to .74. Held in 3 of 3 seeds.
    for seed in (0, 1):
        runtime = Runtime(seed=seed)
        records = noisy_digits(seed)
        pool, population = records.select(np.arange(800)), records.select(np.arange(800, 1797))
        inside = paired_halves(800, 18, runtime.numpy("halves"))
        recipe = TrainingRecipe(epochs=40, lr=3e-3, batch_size=32)
        base = pal.train(small_mlp(), population, task=digits_task, epochs=1, seed=seed)

        seen = []
        for run, mask in enumerate(inside):
            shadow = train_shadow(
                base, pool.select(mask), digits_task, runtime.with_seed(runtime.derive(run)), recipe
            )
            seen.append([observed(shadow, part, digits_task, runtime).phi for part in (pool, population)])
        phi, z = (np.stack(side) for side in zip(*seen, strict=True))
        z = 1 / (1 + np.exp(-z))
        p, truth = 1 / (1 + np.exp(-phi)), inside[17]
        online = lira_online(phi[17][:, None], phi[:16][:, :, None], inside[:16], "pooled")
        a = tune_offline_a(p[:5], inside[:5], z[:5])
        ratio = rmia(p[17], p[:4], inside[:4], z[17], z[:4], a)
        loss = phi[17]
        plain = auc(loss[truth], loss[~truth])
        assert auc(online[truth], online[~truth]) > plain + 0.08
        found, seen = (tpr_at(score[truth], score[~truth], 0.01).rate for score in (online, loss))
        assert found >= 5 * seen
        assert auc(ratio[truth], ratio[~truth]) > plain + 0.08


@pytest.mark.slow
def test_ulira_orders_methods_by_what_they_leave_as_the_card_says(digits_task):
    # Card mia, claim 3; the figures measured are in the assertions' margins: identity .74 balanced accuracy
    # (AUC .85), retain tuning .68 (.78), retraining .51 (.52), while the population attack says .62, .56, .50.
    split = request()
    original, controls = models(split, digits_task)
    evidence = Evidence(original, split, digits_task, Runtime(), original, controls)
    left = {
        name: values(ShadowMembership(method=method).run(evidence))
        for name, method in {"identity": Identity(), "tuning": RetainTuning(), "retrain": "retrain"}.items()
    }
    accuracy = {name: found["ulira_accuracy"] for name, found in left.items()}
    assert accuracy["identity"] > 0.7
    assert abs(accuracy["retrain"] - 0.5) <= 0.05
    assert accuracy["retrain"] + 0.05 < accuracy["tuning"] < accuracy["identity"]
    assert left["identity"]["population_auc"] < left["identity"]["ulira_auc"] - 0.15


@pytest.mark.slow
def test_given_models_are_told_apart_by_lira_where_the_population_attack_fails(digits_task):
    split = request()
    original, controls = models(split, digits_task)
    retrained = pal.forget(original, split, "retrain", digits_task, seed=7)
    found = {}
    for name, model in {"untouched": original, "retrained": retrained}.items():
        evidence = Evidence(model, split, digits_task, Runtime(), original, controls)
        outcome = ShadowMembership(method="retrain", runs=12).run(evidence)
        found[name] = {finding.name: finding for finding in outcome.findings}["online_auc"]
    assert found["untouched"].k == 1 and found["untouched"].value > 0.7
    assert found["retrained"].judgement == Judgement.AS_RETRAINED
    assert abs(found["retrained"].k) < 0.3
