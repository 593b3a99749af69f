"""Pruning, against torch's own magnitude pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune

from palimpsest.audit.attacks.pruning import Pruning, prune
from palimpsest.audit.attacks.weights import matrix_weights
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.finding import Judgement
from palimpsest.models import build_model

AUDIT = Pruning()


def modules(model):
    """Layers with the name of their weight, as torch's pruning wants them."""
    return [(model.get_submodule(name.rpartition(".")[0]), "weight") for name in matrix_weights(model)]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_global_pruning_removes_what_torch_removes(share):
    ours = build_model("small_cnn", (1, 8, 8), 10, seed=0)
    theirs = copy.deepcopy(ours)
    prune(list(matrix_weights(ours).values()), share)
    layers = modules(theirs)
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=share)
    for (mine, _), (other, _) in zip(modules(ours), layers, strict=True):
        assert torch.equal(mine.weight, other.weight)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_pruning_by_layer_removes_what_torch_removes(share):
    ours = build_model("small_cnn", (1, 8, 8), 10, seed=0)
    theirs = copy.deepcopy(ours)
    prune(list(matrix_weights(ours).values()), share, "layer")
    for (mine, _), (other, _) in zip(modules(ours), modules(theirs), strict=True):
        torch_prune.l1_unstructured(other, "weight", amount=share)
        assert torch.equal(mine.weight, other.weight)


@given(st.floats(0.01, 0.99), st.integers(0, 1000))
def test_exactly_the_share_goes_and_nothing_kept_is_smaller(share, seed):
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(4, 6, generator=random), torch.randn(3, 2, 2, generator=random)]
    before = torch.cat([weight.flatten() for weight in weights]).abs()
    prune(weights, share)
    after = torch.cat([weight.flatten() for weight in weights])
    gone = after == 0
    assert int(gone.sum()) == round(share * 36)
    if gone.any() and not gone.all():
        assert before[gone].max() <= before[~gone].min()


def test_the_untouched_model_has_k_of_exactly_one(judge, read, digits_model):
    outcome = judge(AUDIT, copy.deepcopy(digits_model))
    assert [read(outcome, f"forget_{share}").k for share in (10, 30, 50)] == [1.0, 1.0, 1.0]


def test_a_retrained_model_stays_as_the_controls(judge, read, class_controls):
    outcome = judge(AUDIT, class_controls[2])
    for share in (10, 30, 50):
        finding = read(outcome, f"forget_{share}")
        assert abs(finding.k) < 0.3 and finding.judgement == Judgement.AS_RETRAINED


def test_rows_run_from_the_whole_model_to_the_most_pruned(judge, class_controls):
    rows = judge(AUDIT, class_controls[2]).series["pruning"]
    assert sorted({row["share"] for row in rows}) == [0.0, 0.1, 0.3, 0.5]
    assert all(0 <= row["forget_accuracy"] <= 1 and 0 <= row["retain_accuracy"] <= 1 for row in rows)


def test_models_are_left_as_they_were(class_evidence, digits_model, class_controls, unchanged):
    fingerprint, check = unchanged
    before = [fingerprint(model) for model in (digits_model, *class_controls)]
    Pruning(shares=(0.7,)).run(class_evidence.judging(class_controls[2]))
    for model, state in zip((digits_model, *class_controls), before, strict=True):
        check(model, state)


@pytest.mark.parametrize("settings", [{"shares": (0.0,)}, {"shares": (1.0,)}, {"scope": "row"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        Pruning(**settings)
