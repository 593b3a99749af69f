"""Interpolation: both ends are exact, and between independent models lies a barrier."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import palimpsest as pal
from palimpsest.audit.attacks.bare import distance
from palimpsest.audit.attacks.interpolation import Interpolation, barrier, mixed
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.finding import Judgement
from palimpsest.models import build_model
from tests.audit import planted

AUDIT = Interpolation()


def test_the_ends_are_the_models_and_the_middle_is_the_mean():
    first = build_model("small_resnet", (1, 8, 8), 10, seed=0)
    second = build_model("small_resnet", (1, 8, 8), 10, seed=1)
    first.stem[1].num_batches_tracked.fill_(3)
    state = second.state_dict()
    for name, tensor in mixed(first, state, 1.0).state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
    for name, tensor in mixed(first, state, 0.0).state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, parameter in mixed(first, state, 0.5).named_parameters():
        assert torch.allclose(parameter, (dict(first.named_parameters())[name] + state[name]) / 2)


def test_the_distance_of_doubled_weights_is_one(digits_model):
    doubled = {name: 2 * tensor for name, tensor in digits_model.state_dict().items()}
    assert distance(doubled, digits_model.state_dict()) == pytest.approx(1.0, abs=1e-6)
    assert distance(digits_model.state_dict(), digits_model.state_dict()) == 0.0


def test_a_barrier_is_the_largest_drop_below_the_line():
    assert barrier(np.array([0.9, 0.5, 0.1, 0.6, 1.0])) == pytest.approx(0.95 - 0.1)
    assert barrier(np.array([0.2, 0.7, 0.8])) == 0.0


def test_the_untouched_model_has_k_of_exactly_one(judge, read, digits_model):
    outcome = judge(AUDIT, copy.deepcopy(digits_model))
    assert [read(outcome, name).k for name in ("distance", "forget_between", "barrier")] == [1.0, 1.0, 1.0]


def test_retrained_models_lie_far_away_behind_a_barrier(judge, read, class_controls):
    outcome = judge(AUDIT, class_controls[2])
    assert read(outcome, "distance").value > 1.0 and abs(read(outcome, "distance").k) < 0.1
    assert read(outcome, "barrier").value > 0.2
    assert read(outcome, "distance").judgement == Judgement.AS_RETRAINED


def test_a_model_tuned_a_little_lies_near_in_the_same_basin(judge, read, class_evidence, digits_model):
    tuned = pal.train(
        digits_model, class_evidence.split.retain, class_evidence.task, epochs=1, lr=1e-4, seed=5
    )
    outcome = judge(AUDIT, tuned)
    assert read(outcome, "distance").k > 0.9 and read(outcome, "barrier").value < 0.05


def test_the_walk_ends_at_the_original_for_every_model(judge, class_controls):
    rows = judge(AUDIT, class_controls[2]).series["interpolation"]
    ends = {(row["forget_accuracy"], row["retain_accuracy"]) for row in rows if row["a"] == 1.0}
    assert len(ends) == 1
    assert len([row for row in rows if row["model"] == "unlearned"]) == 11


def test_a_wrapped_network_is_walked_from_inside(judge, read, digits_model):
    assert read(judge(AUDIT, planted.OutputFilter(digits_model, 3)), "distance").value == 0.0


def test_another_architecture_is_not_run_and_says_so(judge, read):
    finding = read(judge(AUDIT, build_model("mlp", (1, 8, 8), 10)), "distance")
    assert finding.judgement == Judgement.NOT_RUN and "names and shapes" in finding.note


def test_too_few_points_are_refused():
    with pytest.raises(InvalidHyperparameter, match="points"):
        Interpolation(points=1)
