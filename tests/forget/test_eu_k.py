from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.forget.measuring import accuracy, changed, fingerprint, kept_and_gone

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch
from palimpsest.models import build_model


def moved_layers(before, after):
    return {name.partition(".")[0] for name, mask in changed(before, after).items() if mask.any()}


@pytest.mark.parametrize(
    ("k", "expected"), [(1, {"head"}), (2, {"head", "fc"}), (3, {"head", "fc", "conv2"})]
)
def test_the_last_k_layers_are_new_and_all_before_stay_bit_by_bit(
    k, expected, digits_model, class_request, digits_task
):
    unlearned = pal.forget(digits_model, class_request, "eu-k", digits_task, k=k, epochs=1)
    assert moved_layers(digits_model, unlearned) == expected


def test_what_the_layers_held_has_no_influence_on_the_result(digits_model, class_request, digits_task):
    """Exact unlearning of the last layers: they never come to see what they were."""
    other = copy.deepcopy(digits_model)
    with torch.no_grad():
        for parameter in (*other.fc.parameters(), *other.head.parameters()):
            parameter.add_(1.0)
    runs = [
        fingerprint(pal.forget(model, class_request, "eu-k", digits_task, k=2, epochs=1))
        for model in (digits_model, other)
    ]
    assert runs[0] == runs[1]


def test_layers_are_drawn_once_and_not_in_every_epoch(digits_model, class_request, digits_task):
    """Were they drawn anew, the second epoch would start from chance."""
    settings = {"schedule": "constant", "lr": 0.01}
    few = replace(class_request, retain=class_request.retain.select(range(64)))  # one step an epoch
    accuracies = [
        accuracy(pal.forget(digits_model, few, "eu-k", digits_task, epochs=epochs, **settings), few.retain)
        for epochs in (1, 10, 60)
    ]
    assert accuracies[0] < accuracies[1] < accuracies[2] >= 0.9


def test_a_class_that_the_new_layers_never_saw_is_gone_and_the_rest_is_learned_again(
    digits_model, class_request, digits_task
):
    for seed in range(2):
        unlearned = pal.forget(digits_model, class_request, "eu-k", digits_task, seed=seed)
        kept, gone = kept_and_gone(unlearned, class_request)
        assert kept >= 0.9 and gone <= 0.1  # measured 0.97 and 0.00


def test_batch_norm_on_the_way_moves_but_starts_from_what_it_was(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, width=4)
    before = copy.deepcopy(model.state_dict())
    nearly_still = pal.forget(
        model, class_request, "eu-k", digits_task, k=2, epochs=1, lr=1e-12, lowest_lr=1e-12
    ).state_dict()
    norm, convolution = "blocks.2.shortcut.1", "blocks.2.shortcut.0"
    assert torch.allclose(nearly_still[f"{norm}.weight"], before[f"{norm}.weight"], atol=1e-6)
    assert not torch.equal(nearly_still[f"{norm}.running_mean"], before[f"{norm}.running_mean"])
    assert not torch.allclose(
        nearly_still[f"{convolution}.weight"], before[f"{convolution}.weight"], atol=1e-3
    )
    assert torch.equal(nearly_still["blocks.2.norm2.running_mean"], before["blocks.2.norm2.running_mean"])


@pytest.mark.parametrize("as_weights", [False, True])
def test_layers_can_go_back_to_the_weights_that_training_started_from(
    as_weights, digits_model, class_request, digits_task
):
    initial = build_model("small_cnn", (1, 8, 8), 10, seed=0)  # as in the fixture
    unlearned = pal.forget(
        digits_model, class_request, "eu-k", digits_task, k=2, epochs=1, lr=1e-12, lowest_lr=1e-12,
        initial=initial.state_dict() if as_weights else initial,
    )  # fmt: skip
    assert torch.allclose(unlearned.fc.weight, initial.fc.weight, atol=1e-6)
    assert torch.allclose(unlearned.head.bias, initial.head.bias, atol=1e-6)
    assert torch.equal(unlearned.conv2.weight, digits_model.conv2.weight)


def test_random_records_are_still_known_as_after_retraining(digits_model, random_request, digits_task):
    unlearned = pal.forget(digits_model, random_request, "eu-k", digits_task)
    assert accuracy(unlearned, random_request.forget) >= 0.85


def test_the_same_seed_gives_the_same_bytes_and_the_original_stays(digits_model, class_request, digits_task):
    before = fingerprint(digits_model)
    runs = [
        fingerprint(pal.forget(digits_model, class_request, "eu-k", digits_task, seed=seed, epochs=1))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2] and fingerprint(digits_model) == before


@pytest.mark.parametrize("setting", [{"k": 0}, {"k": 5}, {"schedule": "cosine"}, {"epochs": 0}], ids=str)
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "eu-k", digits_task, **setting)


def test_what_is_missing_or_does_not_fit_is_said(digits_model, class_request, digits_task):
    with pytest.raises(MissingNeed, match="retain-data"):
        pal.forget(digits_model, pal.ForgetSplit(class_request.forget), "eu-k", digits_task)
    other = build_model("small_cnn", (1, 8, 8), 10, hidden=32)
    with pytest.raises(ModelMismatch, match=r"head\.weight"):
        pal.forget(digits_model, class_request, "eu-k", digits_task, initial=other)
