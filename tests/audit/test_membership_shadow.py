"""The shadow audit on real models, and the card's claims at small scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import palimpsest as pal
from palimpsest.audit import examine, shadow
from palimpsest.audit.membership.lira import lira_online
from palimpsest.audit.membership.rates import auc, tpr_at
from palimpsest.audit.membership.rmia import rmia, tune_offline_a
from palimpsest.audit.membership.shadow_audit import ShadowMembership
from palimpsest.audit.membership.shadow_runs import draw_targets
from palimpsest.audit.shadow import observed, paired_halves, train_shadow
from palimpsest.core.errors import CannotWrite, InvalidAudit, MissingNeed, UnknownName
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement, Outcome
from palimpsest.core.runtime import Runtime
from palimpsest.forget._apply import build_unlearner
from palimpsest.parts.training import TrainingRecipe
from tests.audit.membership_data import RECIPE, Identity, RetainTuning, noisy_digits, small_mlp

ALL = ("lira", "rmia", "ulira", "ruli", "challenge")


@dataclass(frozen=True)
class Never:
    """An audit that must not be reached."""

    card = ShadowMembership.card

    def run(self, evidence: Evidence) -> Outcome:
        raise AssertionError("work was done")


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


@pytest.fixture
def trainings(monkeypatch):
    """Training runs of shadow models, one entry each."""
    done: list[int] = []
    fit = shadow.fit

    def counted(model, records, *rest):
        done.append(len(records))
        return fit(model, records, *rest)

    monkeypatch.setattr(shadow, "fit", counted)
    return done


def test_shadow_models_are_trained_once_for_all_attacks_methods_and_audits(
    quick, digits_task, tmp_path, trainings
):
    split, original, controls = quick
    evidence = Evidence(original, split, digits_task, Runtime(), original, controls)
    short = TrainingRecipe(epochs=1)

    def audit(where: Evidence, **settings) -> Outcome:
        before = len(trainings)
        outcome = ShadowMembership(runs=6, recipe=short, folder=tmp_path, **settings).run(where)
        spent.append(len(trainings) - before)
        return outcome

    spent: list[int] = []
    lira = audit(evidence, attacks="lira")
    audit(fresh(evidence), attacks=("rmia",), references=2)
    audit(fresh(evidence), attacks=("ulira",), method=Identity())
    together = audit(evidence, method=Identity(), attacks=("lira", "rmia", "ulira", "ruli"))
    audit(evidence.judging(controls[0]), method="finetune", settings={"epochs": 1})
    audit(fresh(evidence), attacks=("lira",), variance="global")
    assert spent == [6, 0, 6, 0, 0, 0]
    mine = {finding.name: finding for finding in together.findings}
    assert all(mine[finding.name] == finding for finding in lira.findings)


def test_every_attack_says_all_that_an_attack_must_say(quick, digits_task, tmp_path):
    split, original, controls = quick
    recipe = TrainingRecipe(epochs=1)
    audit = ShadowMembership(method=Identity(), runs=6, recipe=recipe, a=None, folder=tmp_path, attacks=ALL)
    outcome = audit.run(Evidence(original, split, digits_task, Runtime(), original, controls))
    found = {finding.name: finding for finding in outcome.findings}
    for attack in ("confidence", "online", "offline", "rmia"):
        for what in ("auc", "accuracy", "gap"):
            finding = found[f"{attack}_{what}"]
            assert finding.low <= finding.value <= finding.high, finding.name
        gap = found[f"{attack}_gap"]
        assert gap.value == pytest.approx(found[f"{attack}_auc"].value - found[f"{attack}_auc"].control)
        assert gap.low < gap.value < gap.high and gap.ideal == 0
        for rate in ("0.01", "0.001"):
            refused = found[f"{attack}_tpr_at_{rate}"]
            assert refused.value is None and "not resolvable" in refused.note
    for game in ("ulira", "ruli"):
        assert found[f"{game}_accuracy"].low <= found[f"{game}_accuracy"].value
        assert "not resolvable" in found[f"{game}_tpr_at_0.001"].note
    assert found["retain_online_auc"].more_is == "harm" and found["retain_online_auc"].k is None
    assert found["hardest_online_auc"].n == 20
    assert found["online_leak"].value == pytest.approx(abs(found["online_auc"].value - 0.5))
    assert 0 <= found["challenge_forgetting"].value <= 1 and "coarse" in found["challenge_forgetting"].note
    assert [finding.name for finding in outcome.findings if finding.bears] == ["online_auc"]
    rows = outcome.series["membership_scores"]
    parts = {
        part: {row["id"] for row in rows if row["part"] == part} for part in ("forget", "holdout", "retain")
    }
    assert parts["forget"] == set(split.forget.ids)
    assert parts["holdout"] <= set(split.holdout.ids) and parts["retain"] <= set(split.retain.ids)
    assert len(parts["retain"]) == len(split.retain) // 4
    scored = {(row["attack"], row["id"]): row["score"] for row in rows}
    assert len(scored) == len(rows) == 4 * sum(map(len, parts.values()))


def test_mislabelled_outliers_are_the_most_exposed_and_come_first(digits_task, tmp_path):
    # Given digits that any network gets right, six of which have a wrong label that it can only memorise.
    digits = pal.load_data("digits").select(np.arange(400))
    labels = digits.column("label").copy()
    plain = pal.split(digits, pal.by_fraction(0.3, seed=0), test=0.2, holdout=0.4, seed=0)
    planted = [plain.forget.ids[position] for position in (3, 11, 17, 22, 30, 38)]
    wrong = np.isin(digits.ids, planted)
    labels[wrong] = (labels[wrong] + 5) % 10
    records = pal.Records(
        torch.utils.data.TensorDataset(digits.tensors["input"], torch.from_numpy(labels)), ids=digits.ids
    )
    request = pal.ForgetSplit(
        **{part: records.select(chosen.positions) for part, chosen in plain.parts.items()}
    )
    recipe = TrainingRecipe(epochs=60, lr=3e-3, batch_size=32)
    original, controls = models(request, digits_task, recipe)
    audit = ShadowMembership(
        method=Identity(), runs=8, retained=0, exposed=8, folder=tmp_path, attacks=("lira", "rmia", "ulira")
    )
    found = {}
    for name, model in {"untouched": original, "retrained": controls[0]}.items():
        evidence = Evidence(model, request, digits_task, Runtime(), original, controls)
        found[name] = examine(evidence, [audit])
    first = [row["id"] for row in rows_of(found["untouched"], "online")[:6]]
    assert set(first) == set(planted)
    assert len({row["id"] for row in rows_of(found["untouched"], "ulira")[:6]} & set(planted)) >= 5
    top = rows_of(found["untouched"], "online")
    assert [row["rank"] for row in top] == list(range(1, 9))
    assert [row["score"] for row in top] == sorted((row["score"] for row in top), reverse=True)
    assert top[0]["false_alarms"] < 0.05 and top[0]["score"] == top[0]["original"] > top[0]["control"]
    # The retrained model never saw them: it is at least as unsure of them as of the others.
    assert not {row["id"] for row in rows_of(found["retrained"], "online")[:3]} & set(planted)
    assert set(first) <= set(
        found["untouched"].finding("shadow-membership.above_all_held_out").note.replace(",", "").split()
    )


def rows_of(report, attack: str):
    return [row for row in report.series["exposed"] if row["attack"] == attack]


def test_the_method_is_taken_from_the_evidence_and_nothing_is_repeated_for_the_original(
    quick, digits_task, tmp_path
):
    split, original, controls = quick
    audit = ShadowMembership(runs=6, recipe=TrainingRecipe(epochs=1), folder=tmp_path, attacks=("ulira",))
    evidence = Evidence(original, split, digits_task, Runtime(), original, controls)
    untouched = values(audit.run(evidence))
    named = values(ShadowMembership(**{**vars(audit), "method": Identity()}).run(fresh(evidence)))
    assert untouched == named
    by_hand = values(ShadowMembership(**{**vars(audit), "method": "retrain"}).run(fresh(evidence)))
    told = Evidence(
        controls[0], split, digits_task, Runtime(), original, controls, method=build_unlearner("retrain", {})
    )
    assert values(audit.run(told)) == by_hand != untouched


def test_without_a_test_part_rmia_is_not_run(quick, digits_task):
    split, original, controls = quick
    bare = pal.ForgetSplit(split.forget, split.retain, holdout=split.holdout)
    audit = ShadowMembership(runs=6, recipe=TrainingRecipe(epochs=1), attacks=("lira", "rmia"))
    outcome = audit.run(Evidence(original, bare, digits_task, Runtime(), original, controls))
    missing = next(finding for finding in outcome.findings if finding.name == "rmia_auc")
    assert missing.judgement == Judgement.NOT_RUN and "population" in missing.note
    assert values(outcome)["online_auc"] is not None


def test_targets_are_matched_and_no_record_has_two_parts(quick, digits_task, class_request, digits_model):
    split, original, _ = quick
    for request, limit in ((split, 500), (split, 10), (class_request, 40)):
        targets = draw_targets(Evidence(original, request, digits_task), limit, retained=15)
        assert len(targets.members) == min(limit, len(request.forget)) >= len(targets.others) > 1
        assert 2 <= len(targets.kept) <= 15 and len(targets.kept_others) <= len(targets.kept)
        chosen = {part: set(request.parts[part].ids) for part in ("forget", "holdout", "retain")}
        ids = np.asarray(targets.records.ids, dtype=object)
        assert len(set(ids)) == len(ids)
        for positions, part in ((targets.members, "forget"), (targets.others, "holdout"),
                                (targets.kept, "retain"), (targets.kept_others, "holdout")):  # fmt: skip
            assert set(ids[positions]) <= chosen[part]
    labels = targets.records.column("label")
    assert set(labels[targets.members]) == set(labels[targets.others]) == {3}
    assert 3 not in labels[targets.kept] and 3 not in labels[targets.kept_others]


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


def test_bad_settings_are_refused_before_any_work(quick, digits_task, tmp_path):
    split, original, controls = quick
    evidence = Evidence(original, split, digits_task, Runtime(), original, controls)
    with pytest.raises(InvalidAudit, match="must know the method"):
        pal.audit(original, split, digits_task, audits=[Never(), ShadowMembership()])
    for runs, targets in ((4, 10), (7, 10), (6, 1)):
        with pytest.raises(InvalidAudit, match="even number of runs"):
            ShadowMembership(method="retrain", runs=runs, targets=targets)
    for settings in ({"workers": -1}, {"references": 1}, {"rates": (0.0,)}, {"a": 1.5}):
        with pytest.raises(InvalidAudit):
            ShadowMembership(method="retrain", **settings)
    with pytest.raises(UnknownName, match="Did you mean 'ulira'"):
        ShadowMembership(attacks="lira,ulria")
    with pytest.raises(UnknownName, match="Did you mean 'pooled'"):
        ShadowMembership(variance="poled")
    taken = tmp_path / "file"
    taken.write_text("here")
    with pytest.raises(CannotWrite):
        ShadowMembership(method="retrain", folder=taken).run(evidence)
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
