"""Quantization: a model that moved inside its rounding cells is the original again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from palimpsest.audit.attacks.quantization import Quantization, resistance
from palimpsest.audit.attacks.rounding import codes, quantize
from palimpsest.audit.attacks.weights import hidden_weights
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.finding import Judgement
from tests.audit import planted

AUDIT = Quantization()


def moved_inside_cells(evidence, bits: int = 4) -> nn.Module:
    """Every weight below the head pushed to the border of its rounding cell, where forget records suffer most.

    The largest magnitude of each row stays, so that the cells stay where they are.
    """
    model = copy.deepcopy(evidence.original).eval()
    batch = next(evidence.runtime.batches(evidence.records("forget"), evidence.task, 512))
    weights = hidden_weights(model, evidence.task)
    with torch.no_grad():
        centres = {name: quantize(weight, bits) for name, weight in weights.items()}
        for name, weight in weights.items():
            largest = weight.flatten(1).abs() == weight.flatten(1).abs().amax(1, keepdim=True)
            weight.copy_(torch.where(largest.view_as(weight), weight, centres[name]))
    evidence.task.loss_per_example(model, batch).mean().backward()
    with torch.no_grad():
        for weight in weights.values():
            flat = weight.flatten(1)
            step = flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            shift = 0.45 * step * weight.grad.flatten(1).sign()
            inside = (flat.abs() < flat.abs().amax(1, keepdim=True)) & ((flat + shift).abs() < 6.9 * step)
            weight.copy_(torch.where(inside, flat + shift, flat).view_as(weight))
    model.zero_grad(set_to_none=True)
    return model


def test_the_untouched_model_has_k_of_exactly_one(judge, read, digits_model):
    outcome = judge(AUDIT, copy.deepcopy(digits_model))
    for bits in (8, 4, 3):
        assert read(outcome, f"forget_{bits}bit").k == 1.0
        assert read(outcome, f"codes_kept_{bits}bit").value == 1.0


def test_weights_moved_inside_their_cells_come_back_at_four_bits_exactly(judge, read, class_evidence):
    original = class_evidence.original
    model = moved_inside_cells(class_evidence)
    for name, weight in hidden_weights(model, class_evidence.task).items():
        mine, theirs = weight.detach(), hidden_weights(original, class_evidence.task)[name].detach()
        assert torch.equal(codes(mine, 4), codes(theirs, 4)) and not torch.equal(mine, theirs)
    outcome = judge(AUDIT, model)
    found = {name: read(outcome, name) for name in ("forget_4bit", "retain_4bit", "codes_kept_4bit")}
    assert found["forget_4bit"].k == 1.0 and found["codes_kept_4bit"].value == 1.0
    assert found["retain_4bit"].value == found["retain_4bit"].original
    rows = {(row["model"], row["bits"]): row["forget_accuracy"] for row in outcome.series["quantization"]}
    assert rows["unlearned", 32] < 0.5 < rows["unlearned", 4]
    assert read(outcome, "forget_4bit_gain").value > 0.5
    assert read(outcome, "q_4bit").value == pytest.approx(rows["unlearned", 32] / rows["unlearned", 4])


def test_a_retrained_model_stays_as_the_controls(judge, read, class_controls):
    outcome = judge(AUDIT, class_controls[2])
    for bits in (8, 4, 3):
        finding = read(outcome, f"forget_{bits}bit")
        assert abs(finding.k) < 0.2 and finding.judgement == Judgement.AS_RETRAINED
        kept = read(outcome, f"codes_kept_{bits}bit")
        assert kept.value == pytest.approx(sum(kept.controls) / 2, abs=0.05)


def test_every_model_is_measured_at_every_format(judge, class_controls):
    audit = Quantization(bits=[8, 2], nf4=True)  # a recipe gives a list
    rows = judge(audit, class_controls[2]).series["quantization"]
    roles = ["original", "unlearned", "control 0", "control 1"]
    assert [(row["model"], row["format"]) for row in rows] == [
        (role, form) for form in ("full", "8bit", "2bit", "nf4") for role in roles
    ]
    assert all(0 <= row["retain_accuracy"] <= 1 for row in rows)


def test_full_precision_is_the_shared_pass(judge, class_evidence, class_controls):
    rows = judge(AUDIT, class_controls[2]).series["quantization"]
    for row in rows[:4]:
        evidence = class_evidence.judging(class_controls[2])
        right = evidence.observe(row["model"], "forget").logits.argmax(1).numpy() == evidence.labels("forget")
        assert row["forget_accuracy"] == pytest.approx(right.mean())


def test_a_wrapped_network_keeps_its_codes(judge, read, digits_model):
    outcome = judge(AUDIT, planted.OutputFilter(digits_model, 3))
    assert read(outcome, "codes_kept_4bit").value == 1.0


def test_models_are_left_as_they_were(class_evidence, digits_model, class_controls, unchanged):
    fingerprint, check = unchanged
    before = [fingerprint(model) for model in (digits_model, *class_controls)]
    Quantization(bits=(2,)).run(class_evidence.judging(class_controls[2]))
    for model, state in zip((digits_model, *class_controls), before, strict=True):
        check(model, state)


def test_a_model_that_is_all_head_is_not_run(judge, read):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    finding = read(judge(AUDIT, model), "forget_4bit")
    assert finding.judgement == Judgement.NOT_RUN and "below its head" in finding.note


@pytest.mark.parametrize("bits", [(1,), (9,), (4, 0)])
def test_bits_outside_two_to_eight_are_refused(bits):
    with pytest.raises(InvalidHyperparameter, match="2 to 8"):
        Quantization(bits=bits)


def test_another_step_convention_is_refused():
    with pytest.raises(InvalidHyperparameter, match="symmetric"):
        Quantization(step="asymmetric")


def test_resistance_is_one_unless_rounding_brings_something_back():
    assert resistance(0.3, 0.6) == 0.5
    assert resistance(0.6, 0.3) == resistance(0.5, 0.5) == resistance(0.4, 0.0) == 1.0
