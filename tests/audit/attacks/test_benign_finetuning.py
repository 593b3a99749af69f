"""Benign fine-tuning: alike for all models, on retained records only."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.audit.attacks.benign_finetuning import BenignFinetuning
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.finding import Judgement
from tests.audit import planted

AUDIT = BenignFinetuning()


def ascended(evidence, goal: float) -> nn.Module:
    """Gradient ascent on the forget records until their accuracy falls to the goal: mild, not thorough."""
    model = copy.deepcopy(evidence.original).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batch = next(evidence.runtime.batches(evidence.records("forget"), evidence.task, 512))
    while float((model(batch["input"]).argmax(1) == batch["label"]).float().mean()) > goal:
        optimizer.zero_grad()
        (-evidence.task.loss_per_example(model, batch).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def test_the_untouched_model_has_k_of_exactly_one(judge, read, digits_model):
    outcome = judge(AUDIT, copy.deepcopy(digits_model))
    assert read(outcome, "final").k == 1.0 and read(outcome, "final_gain").value == 0.0


def test_a_retrained_model_gains_nothing(judge, read, class_controls):
    outcome = judge(AUDIT, class_controls[2])
    final = read(outcome, "final")
    assert final.value <= 0.05 and final.judgement == Judgement.AS_RETRAINED
    assert max(row["accuracy"] for row in outcome.series["relearning"] if row["model"] != "original") <= 0.05
    assert read(outcome, "retain_accuracy").value > 0.9


def test_mild_ascent_is_undone_and_retrained_models_stay(random_evidence, random_controls):
    model = ascended(random_evidence, 0.75)
    plain = random_evidence.judging(model)
    before = np.mean(plain.observe("unlearned", "forget").logits.argmax(1).numpy() == plain.labels("forget"))
    outcome = AUDIT.run(plain)
    curves = {
        role: [row for row in outcome.series["relearning"] if row["model"] == role] for role in plain.roles
    }
    assert curves["unlearned"][0]["accuracy"] == pytest.approx(before)
    assert curves["unlearned"][-1]["accuracy"] >= before + 0.1
    for role in plain.control_roles:
        assert abs(curves[role][-1]["accuracy"] - curves[role][0]["accuracy"]) <= 0.05


def test_only_retained_records_are_trained_on(class_evidence):
    batches = AUDIT.batches(class_evidence)
    trained = {identifier for batch in batches for identifier in batch["id"]}
    assert len(batches) == 40 and {len(batch["id"]) for batch in batches} == {64}
    assert trained <= set(class_evidence.split.retain.ids) and len(trained) > 900


def test_models_are_left_as_they_were(class_evidence, digits_model, class_controls, unchanged):
    fingerprint, check = unchanged
    models = [digits_model, *class_controls]
    before = [fingerprint(model) for model in models]
    BenignFinetuning(steps=3, every=1, lr=1e-2).run(class_evidence.judging(class_controls[2]))
    for model, state in zip(models, before, strict=True):
        check(model, state)


def test_a_wrapper_that_stops_gradients_is_not_run_and_says_so(judge, read, digits_model):
    class NoGradient(planted.OutputFilter):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    final = read(judge(AUDIT, NoGradient(digits_model, 3)), "final")
    assert final.judgement == Judgement.NOT_RUN and "unlearned model cannot be tuned" in final.note


@pytest.mark.parametrize("settings", [{"steps": 0}, {"batch_size": 0}, {"lr": -1.0}, {"optimizer": "rprop"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        BenignFinetuning(**settings)
