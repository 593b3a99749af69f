"""The membership audit on real models: where membership shows, where it cannot, and bad requests."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import palimpsest as pal
from palimpsest.audit.membership.exchangeability import input_features
from palimpsest.audit.membership.inference import Membership
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement
from palimpsest.core.runtime import Runtime
from tests.audit.membership_data import RECIPE, noisy_digits, small_mlp

ATTACKS = ("loss", "confidence", "entropy", "modified_entropy", "logistic")


@pytest.fixture(scope="module")
def noisy_request():
    return pal.split(noisy_digits(), forget=pal.by_fraction(0.4, seed=0), test=0.1, holdout=0.4, seed=0)


@pytest.fixture(scope="module")
def memoriser(noisy_request, digits_task):
    return pal.train(small_mlp(), noisy_request.train, task=digits_task, seed=0, recipe=RECIPE)


@pytest.fixture(scope="module")
def never_saw(memoriser, noisy_request, digits_task):
    return [pal.forget(memoriser, noisy_request, "retrain", digits_task, seed=seed) for seed in (1, 2, 3)]


def run(unlearned: nn.Module, request, task, original=None, controls=(), audit="membership"):
    return pal.audit(unlearned, request, task, original=original, retrained=list(controls), audits=[audit])


def of(report, name: str) -> Finding:
    return report.finding(f"membership.{name}")


@pytest.fixture(scope="module")
def untouched(memoriser, noisy_request, never_saw, digits_task):
    return run(memoriser, noisy_request, digits_task, memoriser, never_saw)


def test_the_untouched_model_is_at_k_1_exactly(untouched):
    scaled = [finding for finding in untouched.findings if finding.k is not None]
    assert {f"{name}_auc" for name in ("loss", "confidence", "modified_entropy")} <= {f.name for f in scaled}
    assert all(finding.k == 1 for finding in scaled)
    assert all(f.value == f.original for f in untouched.findings if f.original is not None)


def test_memorised_records_are_found_and_retrained_models_are_at_chance(untouched):
    loss = of(untouched, "loss_auc")
    assert loss.valid and loss.judgement == Judgement.SEPARATED
    assert loss.value > 0.57 and loss.low > 0.5
    assert all(abs(value - 0.5) < 0.05 for value in loss.controls)
    assert of(untouched, "leak").judgement == Judgement.SEPARATED


def test_a_retrained_model_of_another_seed_passes(memoriser, noisy_request, never_saw, digits_task):
    report = run(never_saw[0], noisy_request, digits_task, memoriser, never_saw[1:])
    for name in ("loss_auc", "modified_entropy_auc", "leak"):
        assert of(report, name).judgement == Judgement.AS_RETRAINED, name
    assert abs(of(report, "loss_auc").k) < 0.3


def test_only_the_headline_bears_on_the_verdict(untouched):
    assert [finding.name for finding in untouched.findings if finding.bears] == ["loss_auc"]


def test_loss_and_confidence_attack_alike(untouched):
    assert of(untouched, "loss_auc").value == of(untouched, "confidence_auc").value


def test_every_attack_has_an_auc_and_both_rates(untouched):
    for attack in ATTACKS:
        finding = of(untouched, f"{attack}_auc")
        assert finding.low <= finding.value <= finding.high
        assert len(finding.controls) == 3
        at_1 = of(untouched, f"{attack}_tpr_at_0.01")
        assert at_1.low <= at_1.value <= at_1.high
        assert "unstable: fewer than 1000 non-members" in at_1.note
        at_01 = of(untouched, f"{attack}_tpr_at_0.001")
        assert at_01.judgement == Judgement.INVALID and at_01.value is None


def test_records_made_to_look_unknown_leak_although_k_calls_them_forgotten(
    memoriser, noisy_request, never_saw, digits_task
):
    # Taught a wrong label for every forget record, the model is less sure of them than of unseen ones.
    model = copy.deepcopy(memoriser)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    forget, retain = (
        part.batch(np.arange(len(part)), digits_task.collate)
        for part in (noisy_request.forget, noisy_request.retain)
    )
    wrong = {**forget, "label": (forget["label"] + 1) % 10}
    for _ in range(300):
        optimizer.zero_grad()
        sum(digits_task.loss_per_example(model, batch).mean() for batch in (retain, wrong)).backward()
        optimizer.step()
    report = run(model.eval(), noisy_request, digits_task, memoriser, never_saw)
    loss = of(report, "loss_auc")
    assert loss.k < 0 and loss.judgement == Judgement.BEYOND
    assert "stand out as less certain" in loss.note
    assert of(report, "leak").judgement == Judgement.SEPARATED


def test_more_memorising_of_the_retained_records_is_reported_as_harm(
    memoriser, noisy_request, never_saw, digits_task
):
    barely = replace(RECIPE, epochs=2)
    controls = [
        pal.forget(memoriser, noisy_request, "retrain", digits_task, seed=seed, recipe=barely)
        for seed in (1, 2, 3)
    ]
    original = pal.train(small_mlp(), noisy_request.train, task=digits_task, seed=0, recipe=barely)
    harm = of(run(never_saw[0], noisy_request, digits_task, original, controls), "retain_loss_auc")
    assert harm.judgement == Judgement.SEPARATED and harm.more_is == "harm" and harm.k is None
    same = of(run(controls[0], noisy_request, digits_task, original, controls[1:]), "retain_loss_auc")
    assert same.judgement == Judgement.AS_RETRAINED


def test_a_forgotten_class_is_compared_with_held_out_records_of_that_class(
    digits_model, class_request, class_controls, digits_task
):
    report = run(digits_model, class_request, digits_task, digits_model, class_controls)
    held_out = int((class_request.holdout.column("label") == 3).sum())
    note = f"{len(class_request.forget)} members, {held_out} non-members"
    assert note in of(report, "loss_auc").note
    rate = of(report, "loss_tpr_at_0.01")
    assert rate.judgement == Judgement.INVALID
    assert f"not resolvable: {held_out} non-members, 100 are needed" in rate.note
    assert of(report, "exchangeability").judgement == Judgement.GOOD
    assert "worst_class_loss_auc" not in {finding.name for finding in report.findings}


def test_the_series_keep_their_contract(untouched):
    roles = {"original", "unlearned", "control 0", "control 1", "control 2"}
    roc = untouched.series["roc"]
    assert {row["model"] for row in roc} == roles
    assert {row["attack"] for row in roc} == set(ATTACKS) - {"confidence"}
    for attack in set(ATTACKS) - {"confidence"}:
        curve = [(r["fpr"], r["tpr"]) for r in roc if r["attack"] == attack and r["model"] == "unlearned"]
        assert 2 <= len(curve) <= 200 and curve == sorted(curve)
        assert curve[0] == (0, 0) and curve[-1] == (1, 1)
    bins = untouched.series["confidence"]
    assert set(bins[0]) == {"model", "part", "low", "high", "share"}
    for role in roles:
        for part in ("forget", "holdout"):
            shares = [row["share"] for row in bins if row["model"] == role and row["part"] == part]
            assert len(shares) == 20 and sum(shares) == pytest.approx(1)
    classes = untouched.series["membership_per_class"]
    assert {row["class"] for row in classes} == {str(digit) for digit in range(10)}
    assert all(row["low"] <= row["auc"] <= row["high"] for row in classes)


class _Masked(nn.Module):
    def __init__(self, model: nn.Module, value: float):
        super().__init__()
        self.model, self.value = copy.deepcopy(model), value

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x).clone()
        out[:, 3] = self.value
        return out


@pytest.mark.parametrize("value", [-math.inf, -1e9])
def test_a_masked_head_gives_finite_findings(value, digits_model, class_request, class_controls, digits_task):
    model = _Masked(digits_model, value)
    report = run(model, class_request, digits_task, digits_model, class_controls)
    for finding in report.findings:
        assert finding.value is None or math.isfinite(finding.value), finding.name
    # All records of the class have the same probability, 0, of being what they are.
    assert of(report, "loss_auc").value == 0.5
    privacy = run(model, class_request, digits_task, digits_model, class_controls, "privacy-score")
    assert math.isfinite(privacy.finding("privacy-score.score").value)


def test_inputs_that_differ_are_warned_of():
    digits = pal.load_data("digits")
    images, labels = digits.tensors["input"], digits.column("label")
    bright = (images.flatten(1).mean(1) > images.mean()).numpy()
    random = np.random.default_rng(0)
    held = random.random(len(labels)) < 0.4
    side = np.where(bright & held, "forget", np.where(~bright & held, "holdout", "retain"))
    records = digits.with_column("side", side)
    request = pal.split(
        records, pal.by_column("side", "forget"), test=0.1, holdout=pal.by_column("side", "holdout"), seed=0
    )
    model = small_mlp()
    finding = of(run(model, request, pal.tasks.Classification()), "exchangeability")
    assert finding.value > 0.8
    assert finding.judgement == Judgement.BAD
    assert "warning" in finding.note


def test_wide_inputs_are_projected_and_keep_their_distances():
    torch.manual_seed(0)
    wide = torch.randn(30, 3, 20, 20)
    records = pal.Records(torch.utils.data.TensorDataset(wide, torch.zeros(30, dtype=torch.long)))
    found = input_features(records, pal.tasks.Classification(), Runtime(batch_size=7))
    assert found.shape == (30, 64)
    ratio = (
        np.linalg.norm(found[:10] - found[10:20], axis=1)
        / (wide[:10] - wide[10:20]).flatten(1).norm(dim=1).numpy()
    )
    assert ratio.mean() == pytest.approx(1, abs=0.15)


def test_without_original_and_controls_there_are_values_and_no_scale(memoriser, noisy_request, digits_task):
    report = run(memoriser, noisy_request, digits_task)
    loss = of(report, "loss_auc")
    assert loss.value > 0.57 and loss.k is None and loss.controls == ()
    assert "hardest_loss_auc" not in {finding.name for finding in report.findings}


def test_a_holdout_without_the_forgotten_labels_gives_not_run(digits, digits_model, digits_task):
    other = pal.by_column("label", 4)
    request = pal.split(digits, pal.by_column("label", 3), test=0.2, holdout=other, seed=0)
    finding = of(run(digits_model, request, digits_task), "loss_auc")
    assert finding.judgement == Judgement.NOT_RUN
    assert "0 held-out records" in finding.note


def test_members_without_a_held_out_record_of_their_label_are_left_out_and_counted(digits, digits_task):
    request = pal.split(
        digits,
        pal.by_column("label", 3, 4),
        test=0.2,
        holdout=pal.by_column("label", 4) & pal.by_fraction(0.5),
        seed=0,
    )
    finding = of(run(small_mlp(), request, digits_task), "loss_auc")
    gone = int((request.forget.column("label") == 3).sum())
    assert f"{gone} members without a held-out record of their label left out" in finding.note


def test_the_same_seed_gives_the_same_findings_and_models_stay_as_they_are(
    digits_model, random_request, random_controls, digits_task
):
    before = copy.deepcopy(digits_model.state_dict())
    reports = [
        run(digits_model, random_request, digits_task, digits_model, random_controls) for _ in range(2)
    ]
    assert reports[0].to_dict() == reports[1].to_dict()
    assert all(torch.equal(before[name], value) for name, value in digits_model.state_dict().items())


def test_all_attacks_share_one_pass_per_model_and_part(
    digits_model, random_request, random_controls, digits_task
):
    runtime = Runtime()
    evidence = Evidence(digits_model, random_request, digits_task, runtime, digits_model, random_controls)
    Membership().run(evidence)
    assert set(runtime.passes.values()) == {1}
    assert len(runtime.passes) == 5 * 4


def test_settings_out_of_range_are_refused():
    for settings in ({"folds": 1}, {"published": -1}, {"rates": (0.0,)}):
        with pytest.raises(InvalidAudit):
            Membership(**settings)


def test_the_published_attacks_can_be_left_out(digits_model, random_request, digits_task):
    evidence = Evidence(digits_model, random_request, digits_task)
    names = {finding.name for finding in Membership(published=0).run(evidence).findings}
    assert "svc_member_share" not in names and "loss_auc" in names
