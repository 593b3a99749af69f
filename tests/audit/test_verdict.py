"""The verdict on models whose truth is known, over five seeds; every one must be right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import palimpsest as pal
from palimpsest.audit import examine
from palimpsest.audit.verdict import judge
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding
from palimpsest.models import build_model
from tests.audit import planted

SEEDS = range(5)
LABEL = 7


@pytest.fixture(scope="module", params=SEEDS, ids=[f"seed {seed}" for seed in SEEDS])
def original(request, digits, digits_task):
    seed = request.param
    parts = pal.split(digits, pal.by_column("label", LABEL), seed=seed)
    network = build_model("small_cnn", (1, 8, 8), 10, seed=seed)
    return seed, pal.train(network, parts.train, digits_task, epochs=20, seed=seed)


def gathered(digits, task, original, rule) -> tuple[Evidence, nn.Module]:
    """Evidence with three controls, and a fourth retraining to be judged."""
    seed, model = original
    parts = pal.split(digits, rule, seed=seed)
    *controls, further = [pal.forget(model, parts, "retrain", task, seed=100 + k) for k in range(4)]
    return Evidence(model, parts, task, pal.Runtime(seed=seed, threads=1), model, controls), further


@pytest.fixture(scope="module")
def class_evidence(digits, digits_task, original):
    return gathered(digits, digits_task, original, pal.by_column("label", LABEL))


@pytest.fixture(scope="module")
def random_evidence(digits, digits_task, original):
    return gathered(digits, digits_task, original, pal.by_fraction(0.1, seed=original[0]))


PLANTED: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "untouched": ("intact", lambda model: model),
    "the same function, units permuted": ("intact", planted.permuted),
    "noise that changes nothing": ("intact", lambda model: planted.noisy(model, 1e-4)),
    "weights destroyed by noise": ("damaged", lambda model: planted.noisy(model, 0.3)),
    "another class masked": ("damaged", lambda model: planted.head_masked(model, (LABEL + 1) % 10)),
    "head bias masked": ("suppressed", lambda model: planted.head_masked(model, LABEL)),
    "head row removed": ("suppressed", lambda model: planted.head_row_removed(model, LABEL)),
    "logit masked by a wrapper": ("suppressed", lambda model: planted.MaskedOutput(model, LABEL)),
    "logit at minus infinity": (
        "suppressed",
        lambda model: planted.MaskedOutput(model, LABEL, float("-inf")),
    ),
    "logit masked by a hook": ("suppressed", lambda model: planted.hooked(model, LABEL)),
    "output filter": ("suppressed", lambda model: planted.OutputFilter(model, LABEL)),
    "input guard": ("suppressed", lambda model: planted.InputGuard(model, LABEL)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_class_forgetting_is_judged_by_what_was_done(class_evidence, name):
    evidence, _ = class_evidence
    expected, plant = PLANTED[name]
    report = examine(evidence.judging(plant(evidence.original)))
    assert report.verdict == expected, report.reasons


def test_a_retrained_model_is_removed_for_class_forgetting(class_evidence):
    evidence, further = class_evidence
    report = examine(evidence.judging(further))
    assert report.verdict == "removed", report.reasons


def test_a_retraining_from_the_originals_own_start_is_removed(class_evidence, digits_task, original):
    evidence, _ = class_evidence
    start = build_model("small_cnn", (1, 8, 8), 10, seed=original[0])
    again = pal.train(start, evidence.split.retain, digits_task, epochs=20, seed=original[0])
    report = examine(evidence.judging(again))
    assert report.verdict == "removed", report.reasons


def test_one_control_is_enough_for_the_five_cases(class_evidence):
    evidence, further = class_evidence
    single = Evidence(
        further, evidence.split, evidence.task, evidence.runtime, evidence.original, evidence.controls[:1]
    )
    cases = {
        "removed": further,
        "intact": evidence.original,
        "damaged": planted.noisy(evidence.original, 0.3),
        "suppressed": planted.OutputFilter(evidence.original, LABEL),
    }
    assert {want: examine(single.judging(model)).verdict for want, model in cases.items()} == {
        want: want for want in cases
    }
    assert examine(single.judging(planted.head_masked(evidence.original, LABEL))).verdict == "suppressed"


@pytest.mark.parametrize(
    ("expected", "plant"),
    [
        ("intact", lambda model, _: model),
        ("removed", lambda _, further: further),
        ("damaged", lambda model, _: planted.noisy(model, 0.3)),
    ],
    ids=["untouched", "retrained", "weights destroyed by noise"],
)
def test_random_forgetting_is_judged_by_what_was_done(random_evidence, expected, plant):
    evidence, further = random_evidence
    report = examine(evidence.judging(plant(evidence.original, further)))
    assert report.verdict == expected, report.reasons


def test_without_a_control_the_verdict_is_inconclusive(class_request, digits_model, digits_task):
    report = pal.audit(
        original=digits_model,
        unlearned=planted.head_masked(digits_model, 3),
        split=class_request,
        task=digits_task,
        audits=["utility", "separation"],
    )
    assert report.verdict == "inconclusive" and "no retrained model" in report.reasons[0]


def test_too_few_records_are_inconclusive(digits, digits_model, digits_task, class_controls):
    parts = pal.split(digits, pal.by_ids(digits.ids[:4]), seed=0)
    report = pal.audit(
        original=digits_model, unlearned=class_controls[0], retrained=class_controls[1:], split=parts, task=digits_task,
        audits=["utility"],
    )  # fmt: skip
    assert report.verdict == "inconclusive" and "Only 4 records" in report.reasons[0]


def test_an_audit_that_was_not_run_is_said_so(class_request, digits_model, digits_task, class_controls):
    report = pal.audit(
        original=digits_model, unlearned=class_controls[0], retrained=class_controls[1:],
        split=class_request, task=digits_task, audits=["utility"],
    )  # fmt: skip
    assert report.verdict == "inconclusive"
    assert {f.audit for f in report.findings if f.judgement == "not run"} >= {"separation", "relearning"}


def finding(name: str, k: float, bears: str, audit: str = "utility") -> Finding:
    return Finding(
        audit,
        name,
        k,
        original=1.0,
        controls=(0.0, 0.0),
        k=k,
        k_low=k - 0.1,
        k_high=k + 0.1,
        valid=True,
        bears=bears,
    )


@pytest.mark.parametrize(
    ("expected", "findings"),
    [
        ("removed", [finding("a", 0.0, "outputs"), finding("b", 0.1, "inside")]),
        ("suppressed", [finding("a", 0.0, "outputs"), finding("b", 0.6, "inside")]),
        ("incomplete", [finding("a", 0.5, "outputs"), finding("b", 0.6, "inside")]),
        (
            "suppressed",
            [finding("a", 0.0, "outputs"), finding("c", 0.9, "outputs"), finding("b", 1.0, "inside")],
        ),
        ("intact", [finding("a", 0.95, "outputs"), finding("b", 1.0, "inside")]),
        ("intact", [finding("a", 0.9, "lineage"), finding("b", 1.0, "lineage")]),
        ("incomplete", [finding("a", 0.6, "lineage"), finding("b", 0.9, "lineage")]),
        ("removed", [finding("a", 0.1, "lineage"), finding("b", 0.9, "lineage")]),
        ("inconclusive", [finding("a", 0.0, "outputs")]),
        ("inconclusive", [finding("a", 0.0, "inside")]),
    ],
)
def test_the_rules_of_the_verdict(expected, findings):
    assert judge(findings, records=50).verdict == expected


def test_damage_done_by_a_wrapper_around_a_knowing_network_is_suppression():
    broken = Finding(
        "utility",
        "test_accuracy",
        0.3,
        0.28,
        0.32,
        400,
        original=0.96,
        controls=(0.95, 0.94),
        bears="utility",
    )
    gone, still = finding("a", 0.0, "outputs"), finding("b", 1.0, "inside")
    bare = finding("inner_forget_accuracy", 1.0, "inside", "unwrapping")
    assert judge([broken, gone, still], 50).verdict == "damaged"
    judgment = judge([broken, gone, bare], 50)
    assert (
        judgment.verdict == "suppressed" and "As it is served: utility.test_accuracy" in judgment.reasons[-1]
    )


def test_a_loss_of_utility_within_the_spread_of_the_controls_is_no_damage():
    def utility(value: float, controls: tuple[float, ...]) -> list[Finding]:
        accuracy = Finding(
            "utility", "test_accuracy", value, value - 0.02, value + 0.02, 400, original=0.96, controls=controls,
            bears="utility",
        )  # fmt: skip
        return [accuracy, finding("a", 0.0, "outputs"), finding("b", 0.0, "inside")]

    assert judge(utility(0.90, (0.95, 0.94, 0.96)), 50).verdict == "removed"
    assert judge(utility(0.80, (0.95, 0.94, 0.96)), 50).verdict == "damaged"
    assert judge(utility(0.80, (0.95, 0.60, 0.80)), 50).verdict == "removed"
