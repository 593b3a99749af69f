"""Models of known fate, and measurements of the claims on representations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.study.claims import MEASUREMENTS, Setting
from palimpsest.study.planted import PlantedHead, PlantedWreck, accuracy

LABEL = 3


@pytest.fixture
def runtime():
    return pal.Runtime(seed=0, device="cpu")


def test_a_planted_head_changes_one_bias_and_answers_the_class_never(
    digits_model, class_request, digits_task, runtime
):
    cheat = PlantedHead().unlearn(digits_model, class_request, digits_task, runtime)
    assert accuracy(cheat, class_request.forget, digits_task, runtime) == 0
    before = accuracy(digits_model, class_request.retain, digits_task, runtime)
    assert accuracy(cheat, class_request.retain, digits_task, runtime) >= before
    state = digits_model.state_dict()
    differ = {k for k, v in cheat.state_dict().items() if not torch.equal(v, state[k])}
    assert differ == {"head.bias"} and int((cheat.head.bias != digits_model.head.bias).sum()) == 1


def test_a_planted_head_needs_a_whole_class_and_a_bias(
    digits_model, class_request, random_request, digits_task, runtime
):
    with pytest.raises(InvalidHyperparameter, match="as a whole"):
        PlantedHead().unlearn(digits_model, random_request, digits_task, runtime)
    with pytest.raises(InvalidHyperparameter, match="no bias"):
        PlantedHead().unlearn(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), class_request, digits_task, runtime
        )


def test_a_planted_wreck_stops_where_the_retained_accuracy_has_halved(
    digits_model, class_request, digits_task, runtime
):
    start = accuracy(digits_model, class_request.retain, digits_task, runtime)
    wreck = PlantedWreck().unlearn(digits_model, class_request, digits_task, runtime)
    assert 0.05 < accuracy(wreck, class_request.retain, digits_task, runtime) <= start / 2
    assert accuracy(digits_model, class_request.retain, digits_task, runtime) == start
    whole = PlantedWreck(share=1.0).unlearn(digits_model, class_request, digits_task, runtime)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), digits_model.parameters(), strict=True))
    with pytest.raises(MissingNeed, match="retained"):
        PlantedWreck().unlearn(digits_model, replace(class_request, retain=None), digits_task, runtime)
    with pytest.raises(InvalidHyperparameter, match="larger"):
        PlantedWreck(lr=1e-9, most_steps=3).unlearn(digits_model, class_request, digits_task, runtime)


def test_cka_of_real_features_is_blind_to_what_the_claim_names(
    digits_model, class_request, digits_task, runtime
):
    setting = Setting(digits_model, class_request, digits_task, runtime)
    assert 0 <= MEASUREMENTS.get("representation-evaluation.invariance-error")(setting) < 1e-9
    assert MEASUREMENTS.get("representation-evaluation.linear-map-change")(setting) > 0.05


def test_the_verdict_on_a_masked_head_is_suppressed(digits_model, class_request, digits_task, runtime):
    setting = Setting(digits_model, class_request, digits_task, runtime)
    assert MEASUREMENTS.get("representation-evaluation.cheat-suppressed")(setting) == 1
