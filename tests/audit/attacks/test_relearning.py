"""Relearning: the original knows at once, a retrained model learns anew, a silenced one remembers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.audit.attacks.relearning import Relearning
from palimpsest.core.errors import InvalidHyperparameter, PalimpsestError
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.runtime import Runtime
from tests.audit import planted

LABEL = 3
AUDIT = Relearning()


class Opaque(nn.Module):
    """An unknown architecture: the network's layers under other names, with the class masked."""

    def __init__(self, model: nn.Module, value: float, gradient: bool = True):
        super().__init__()
        self.layers = nn.ModuleList([copy.deepcopy(module) for module in model.children()])
        self.value, self.gradient = value, gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv1, conv2, fc, head = self.layers
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            x = torch.max_pool2d(conv1(x).relu(), 2)
            x = torch.max_pool2d(conv2(x).relu(), 2)
            logits = head(fc(x.flatten(1)).relu())
        mask = torch.zeros(logits.shape[1], dtype=torch.bool)
        mask[LABEL] = True
        return logits.masked_fill(mask, self.value)


def test_the_untouched_model_has_k_of_exactly_one(judge, read, digits_model):
    outcome = judge(AUDIT, copy.deepcopy(digits_model))
    for name in ("area", "area_confidence", "levelled"):
        assert read(outcome, name).k == 1.0
    assert read(outcome, "area_gain").value == 0.0
    assert read(outcome, "area").value > 0.9


def test_a_control_judged_against_itself_gives_its_own_value(judge, read, class_controls):
    area = read(judge(AUDIT, class_controls[0]), "area")
    assert area.value == area.controls[0]


def test_a_retrained_model_relearns_like_the_controls(judge, read, class_controls):
    area = read(judge(AUDIT, class_controls[2]), "area")
    assert area.valid and area.judgement == Judgement.AS_RETRAINED
    assert abs(area.k) < 0.4


@pytest.mark.parametrize(
    "plant",
    [
        planted.head_masked,
        planted.hooked,
        planted.MaskedOutput,
        lambda model, label: planted.MaskedOutput(model, label, float("-inf")),
        planted.OutputFilter,
        planted.InputGuard,
    ],
    ids=["head bias", "hook", "wrapper", "wrapper at minus infinity", "output filter", "input guard"],
)
def test_what_only_silences_the_output_comes_back_as_the_original(judge, read, digits_model, plant):
    assert read(judge(AUDIT, plant(digits_model, LABEL)), "area").k == pytest.approx(1.0, abs=0.02)


def test_the_gain_is_what_the_attack_adds_to_the_plain_accuracy(judge, read, digits_model):
    outcome = judge(AUDIT, planted.OutputFilter(digits_model, LABEL))
    assert read(outcome, "area_gain").value == pytest.approx(read(outcome, "area").k, abs=1e-9)


def test_a_removed_head_row_comes_back_faster_than_a_class_never_seen(judge, read, digits_model):
    outcome = judge(AUDIT, planted.head_row_removed(digits_model, LABEL))
    assert read(outcome, "area").k > 0.5
    assert read(outcome, "speed").value > 1.5


def test_a_fresh_row_makes_models_alike_that_differ_only_in_that_row(judge, read, digits_model):
    """An output that was pushed far down through its own row is relearned as fast as the original's."""
    buried = copy.deepcopy(digits_model)
    with torch.no_grad():
        buried.head.weight[LABEL] -= 5.0
    audit = Relearning(head="fresh", lr=1e-3)
    fresh = read(judge(audit, buried), "area")
    assert fresh.value == fresh.original and fresh.value > np.mean(fresh.controls) + 0.1
    assert read(judge(AUDIT, buried), "area").k < 0.2


def test_the_original_needs_at_most_half_of_the_controls_steps(judge, read, digits_model):
    speed = read(judge(AUDIT, digits_model), "speed")
    assert speed.original >= 2.0
    assert np.mean(speed.controls) == pytest.approx(1.0, abs=0.2)


def test_a_mask_of_minus_infinity_in_an_unknown_architecture_leaves_the_attack_finite(
    judge, read, digits_model
):
    outcome = judge(AUDIT, Opaque(digits_model, float("-inf")))
    assert read(outcome, "area").value == 0.0
    assert "diverged" not in read(outcome, "area").note


def test_outputs_without_gradient_are_not_run_and_say_so(judge, read, digits_model):
    area = read(judge(AUDIT, Opaque(digits_model, -5.0, gradient=False)), "area")
    assert area.judgement == Judgement.NOT_RUN and "no gradient" in area.note


def test_a_model_without_parameters_is_not_run_and_says_so(judge, read):
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10)

    area = read(judge(AUDIT, Constant()), "area")
    assert area.judgement == Judgement.NOT_RUN and "no parameters" in area.note


def test_freezing_the_parameters_protects_nothing(judge, read, class_controls):
    frozen = copy.deepcopy(class_controls[2])
    frozen.requires_grad_(False)
    assert read(judge(AUDIT, frozen), "area").value == read(judge(AUDIT, class_controls[2]), "area").value


def test_models_are_left_as_they_were(class_evidence, digits_model, class_controls, unchanged):
    fingerprint, check = unchanged
    models = [digits_model, *class_controls]
    before = [fingerprint(model) for model in models]
    fresh = Evidence(
        class_controls[2],
        class_evidence.split,
        class_evidence.task,
        class_evidence.runtime,
        digits_model,
        class_controls[:2],
    )
    Relearning(steps=4, repetitions=1, lr=1e-2).run(fresh)
    for model, state in zip(models, before, strict=True):
        check(model, state)


def test_the_same_seed_gives_the_same_values_and_another_seed_others(
    class_request, digits_task, digits_model, class_controls
):
    def values(seed: int) -> list[float | None]:
        runtime = Runtime(seed=seed, device="cpu")
        evidence = Evidence(
            class_controls[2], class_request, digits_task, runtime, digits_model, class_controls[:1]
        )
        findings = Relearning(steps=10, repetitions=1, lr=1e-3).run(evidence).findings
        return [finding.value for finding in findings]

    assert values(0) == values(0)
    assert values(0) != values(1)


def test_relearned_records_are_never_measured(class_evidence):
    forget = class_evidence.records("forget")
    for draw in AUDIT.draws(class_evidence):
        trained = {identifier for batch in draw.batches for identifier in batch["id"]}
        measured = {forget.ids[position] for position in draw.rest}
        assert len(trained & set(forget.ids)) == 5 and len(trained) == 50
        assert not trained & measured
        assert len(measured) == len(forget) - 5


def test_folds_are_disjoint_and_cover_the_forget_records(class_evidence):
    forget = set(class_evidence.records("forget").ids)
    draws = Relearning(folds=4, companions=0).draws(class_evidence)
    trained = [{identifier for batch in draw.batches for identifier in batch["id"]} for draw in draws]
    assert set.union(*trained) == forget
    assert sum(len(fold) for fold in trained) == len(forget)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.5])
def test_a_fraction_relearns_that_share_of_the_records(class_evidence, fraction):
    count = len(class_evidence.records("forget"))
    draw = Relearning(fraction=fraction, companions=0, batch_size=512).draws(class_evidence)[0]
    assert len(draw.batches[0]["id"]) == round(fraction * count)
    assert len(draw.rest) == count - round(fraction * count)


def test_the_learning_rate_is_the_smallest_at_which_the_control_comes_to_half(class_evidence, class_controls):
    chosen = next(
        f for f in AUDIT.run(class_evidence.judging(class_controls[2])).findings if f.name == "area"
    )
    lr = float(chosen.note.split(" at ")[1].split(",")[0])
    grid = [rate for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2) if rate <= lr]
    finals = {}
    for rate in grid:
        outcome = Relearning(lr=rate).run(class_evidence.judging(class_controls[0]))
        finals[rate] = next(
            row for row in reversed(outcome.series["relearning"]) if row["model"] == "control 0"
        )["accuracy"]
    half = 0.5 * np.mean(
        class_evidence.observe("original", "forget").logits.argmax(1).numpy()
        == class_evidence.labels("forget")
    )
    assert finals[lr] >= half
    assert all(finals[rate] < half for rate in grid[:-1])


def test_the_area_is_the_mean_of_the_curve(judge, read, class_controls):
    outcome = judge(AUDIT, class_controls[2])
    curves = outcome.series["relearning"]
    assert {row["model"] for row in curves} == {"original", "unlearned", "control 0", "control 1"}
    own = [row for row in curves if row["model"] == "unlearned"]
    assert [row["step"] for row in own] == list(range(0, 41, 2))
    mean = np.mean([row["accuracy"] for row in own[1:]])
    # Draws overlap: the finding weighs records alike, the curve weighs draws alike.
    assert read(outcome, "area").value == pytest.approx(mean, abs=0.01)
    assert read(outcome, "final").value == pytest.approx(own[-1]["accuracy"], abs=0.02)


def test_random_forgetting_has_no_range_and_is_judged_invalid(random_evidence, read, random_controls):
    outcome = AUDIT.run(random_evidence.judging(random_controls[2]))
    area = read(outcome, "area")
    assert area.value > 0.8 and area.valid is False and area.judgement == Judgement.INVALID
    assert read(outcome, "area_confidence").value is not None


def test_without_an_original_only_absolute_values_are_given(class_request, digits_task, class_controls, read):
    evidence = Evidence(
        class_controls[2], class_request, digits_task, Runtime(device="cpu"), None, class_controls[:1]
    )
    area = read(Relearning(steps=4, repetitions=1).run(evidence), "area")
    assert area.value is not None and area.k is None and area.original is None


def test_too_few_forget_records_are_not_run(digits, digits_task, digits_model, read):
    parts = pal.split(digits, pal.by_ids(digits.ids[:6]), seed=0)
    evidence = Evidence(digits_model, parts, digits_task, Runtime(device="cpu"), digits_model)
    area = read(AUDIT.run(evidence), "area")
    assert area.judgement == Judgement.NOT_RUN and "6 forget records" in area.note


@pytest.mark.parametrize(
    "settings",
    [
        {"few": 0},
        {"fraction": 1.5},
        {"folds": 1},
        {"steps": 0},
        {"every": 50},
        {"lr": 0.0},
        {"optimizer": "newton"},
        {"head": "none"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        Relearning(**settings)


def test_an_unknown_setting_is_refused():
    from palimpsest.core.unlearner import build

    with pytest.raises(PalimpsestError, match="few"):
        build("audit", Relearning, "relearning", {"fews": 3})
