from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch
from palimpsest.forget.classifier.fisher_noise import (
    empirical_deviation,
    noise_distribution,
    per_sample_fisher,
)
from palimpsest.models import build_model


def accuracy(model, records):
    with torch.no_grad():
        return (model(records.tensors["input"]).argmax(1) == records.tensors["label"]).float().mean().item()


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def batches(x, y, size):
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield {"input": x[part], "label": y[part], "id": [str(i) for i in range(len(x[part]))]}


@pytest.fixture(scope="module")
def small():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(7, 1, 4, 4, generator=generator)
    y = torch.randint(3, (7,), generator=generator)
    return build_model("small_cnn", (1, 4, 4), 3, seed=0, width=2, hidden=5), x, y


def fisher_by_loops(model, x, y, variant):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        log_p = model(x[i : i + 1])[0].log_softmax(0)
        for label in range(len(log_p)) if variant == "expected" else [int(y[i])]:
            gradients = torch.autograd.grad(log_p[label], list(model.parameters()), retain_graph=True)
            for name, gradient in zip(total, gradients, strict=True):
                if variant == "expected":
                    total[name] += log_p[label].exp().detach() * gradient**2 / len(x)
                else:
                    total[name] += (gradient + 1e-8) ** 2 / len(x)
    return total


@pytest.mark.parametrize("variant", ["expected", "empirical"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_fisher_information_is_that_of_loops_over_records_and_classes(small, variant, size):
    model, x, y = small
    found = per_sample_fisher(model, batches(x, y, size), pal.tasks.Classification(), variant)
    expected = fisher_by_loops(model, x, y, variant)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-10)


def test_the_expected_fisher_of_a_linear_model_has_a_closed_form():
    generator = torch.Generator().manual_seed(3)
    x, model = torch.randn(5, 4, generator=generator), nn.Linear(4, 3)
    labels = torch.zeros(5, dtype=torch.long)
    found = per_sample_fisher(model, batches(x, labels, 5), pal.tasks.Classification(), "expected")
    p = model(x).softmax(1).detach()
    assert torch.allclose(found["bias"], (p * (1 - p)).mean(0), atol=1e-6)  # the variance of each class
    assert torch.allclose(found["weight"], (p * (1 - p)).T @ x**2 / 5, atol=1e-6)


def test_gradients_do_not_reach_the_model_and_a_model_in_evaluation_mode_is_measured(
    class_request, digits_task
):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0, width=4).train()
    before = copy.deepcopy(model.state_dict())
    tensors = class_request.retain.select(range(6)).tensors
    found = per_sample_fisher(model, batches(tensors["input"], tensors["label"], 3), digits_task)
    expected = fisher_by_loops(copy.deepcopy(model).eval(), tensors["input"], tensors["label"], "expected")
    assert torch.allclose(found["head.weight"], expected["head.weight"], rtol=1e-3, atol=1e-7)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_the_variance_of_a_hidden_matrix_is_the_mean_over_inputs_of_capped_inverse_information():
    parameter, fisher = torch.ones(2, 2), torch.tensor([[0.0, 0.5], [0.004, 4.0]])
    mean, variance = noise_distribution(parameter, fisher, alpha=2.0, classes=10)
    assert torch.equal(mean, parameter)
    assert torch.allclose(variance, torch.tensor([[1002.0, 1002.0], [250.25, 250.25]]), rtol=1e-4)


def test_a_kernel_is_averaged_over_its_input_channels_only():
    fisher = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    _, variance = noise_distribution(torch.zeros(4, 3, 2, 2), fisher, alpha=1.0, classes=10)
    expected = (1 / (fisher + 1e-8)).mean(1)
    assert all(torch.allclose(variance[:, channel], expected) for channel in range(3))


def test_a_bias_gets_ten_times_the_variance_and_no_average():
    _, variance = noise_distribution(torch.zeros(3), torch.tensor([0.0, 0.5, 2.0]), alpha=1.0, classes=10)
    assert torch.allclose(variance, torch.tensor([10_000.0, 20.0, 5.0]))


def test_the_head_is_capped_lower_and_boosted_once():
    _, variance = noise_distribution(
        torch.zeros(2, 2), torch.tensor([[0.0, 0.5], [1.0, 1.0]]), 1.0, classes=2
    )
    assert torch.allclose(variance, torch.tensor([[510.0, 510.0], [10.0, 10.0]]))
    _, variance = noise_distribution(torch.zeros(2), torch.tensor([0.0, 0.5]), 1.0, classes=2)
    assert torch.allclose(variance, torch.tensor([1000.0, 20.0]))


def test_rows_of_forgotten_classes_are_drawn_around_zero_whatever_alpha():
    parameter = torch.full((3, 2), 5.0)
    for alpha in (0.0, 1e-6, 1.0):
        mean, variance = noise_distribution(parameter, torch.ones(3, 2), alpha, classes=3, forgotten=[0, 2])
        assert mean.tolist() == [[0, 0], [5, 5], [0, 0]]
        assert torch.allclose(variance[[0, 2]], torch.tensor(1e-3))
        assert variance[1].tolist() == pytest.approx([10 * alpha] * 2)
    hidden = torch.ones(4, 2)
    assert torch.equal(noise_distribution(hidden, torch.ones(4, 2), 1.0, 3, [0])[0], hidden)


def test_the_simple_deviation_is_capped():
    found = empirical_deviation(torch.tensor([1e-16, 1.0, 100.0]), alpha=1e-8)
    assert found.tolist() == pytest.approx([1e-3, 1e-4, 1e-5])


def test_noise_has_the_variance_that_the_rule_gives(class_request, digits_task):
    model = build_model("mlp", (1, 8, 8), 10, seed=0, width=64, depth=1)
    few = replace(class_request, retain=class_request.retain.select(range(64)), forget=class_request.forget)
    unlearned = pal.forget(model, few, "fisher-noise", digits_task, alpha=1e-4, reset_rows=False)
    tensors = few.retain.tensors
    fisher = fisher_by_loops(model, tensors["input"], tensors["label"], "expected")["hidden.0.weight"]
    change = (unlearned.hidden[0].weight - model.hidden[0].weight).detach()
    _, variance = noise_distribution(model.hidden[0].weight, fisher, 1e-4, 10)
    standard = change / variance.sqrt()
    n = standard.numel()  # 4096: four standard errors
    assert abs(standard.mean().item()) < 4 / n**0.5
    assert abs(standard.var().item() - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("variant", ["expected", "empirical"])
def test_without_noise_nothing_changes(variant, digits_model, random_request, digits_task):
    few = replace(random_request, retain=random_request.retain.select(range(50)))
    settings = {"variant": variant}
    still = pal.forget(digits_model, few, "fisher-noise", digits_task, alpha=0.0, **settings)
    assert same(still, digits_model)
    nearly = pal.forget(digits_model, few, "fisher-noise", digits_task, alpha=1e-34, **settings)
    for a, b in zip(nearly.parameters(), digits_model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-7


def test_a_class_is_forgotten_through_the_head_and_the_rest_kept(digits_model, class_request, digits_task):
    unlearned = pal.forget(digits_model, class_request, "fisher-noise", digits_task)
    assert accuracy(unlearned, class_request.forget) <= 0.2  # measured 0.000 to 0.009 over three seeds
    assert accuracy(unlearned, class_request.retain) >= 0.93  # measured 0.960 to 0.966
    kept = pal.forget(digits_model, class_request, "fisher-noise", digits_task, reset_rows=False)
    assert accuracy(kept, class_request.forget) >= 0.8  # noise alone does not aim at the class


def test_more_noise_costs_accuracy_everywhere(digits_model, random_request, digits_task):
    few = replace(random_request, retain=random_request.retain.select(range(200)))
    low, high = (
        pal.forget(digits_model, few, "fisher-noise", digits_task, alpha=alpha) for alpha in (1e-8, 1e-4)
    )
    assert accuracy(low, random_request.test) >= 0.93
    assert accuracy(high, random_request.test) <= accuracy(low, random_request.test) - 0.2


def test_the_simple_variant_moves_no_weight_far(digits_model, class_request, digits_task):
    unlearned = pal.forget(
        digits_model, class_request, "fisher-noise", digits_task, variant="empirical", alpha=1.0
    )
    for a, b in zip(unlearned.parameters(), digits_model.parameters(), strict=True):
        assert 0 < (a - b).abs().max() < 6e-3  # six deviations of at most 1e-3


def test_part_of_a_class_can_be_forgotten(digits, digits_model, digits_task):
    part = pal.by_column("label", 3) & pal.by_fraction(0.3, seed=0)
    request = pal.split(digits, part, test=0.2, holdout=0.2, seed=0)
    unlearned = pal.forget(digits_model, request, "fisher-noise", digits_task)
    assert accuracy(unlearned, request.test) >= 0.9 and not same(unlearned, digits_model)


def test_the_same_seed_gives_the_same_bytes_and_the_original_stays(digits_model, class_request, digits_task):
    few = replace(class_request, retain=class_request.retain.select(range(64)))
    before = copy.deepcopy(digits_model)
    runs = [pal.forget(digits_model, few, "fisher-noise", digits_task, seed=seed) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert same(digits_model, before)


def test_frozen_parameters_stay(digits_model, class_request, digits_task):
    model = copy.deepcopy(digits_model)
    model.conv1.requires_grad_(False)
    few = replace(class_request, retain=class_request.retain.select(range(32)))
    unlearned = pal.forget(model, few, "fisher-noise", digits_task)
    assert torch.equal(unlearned.conv1.weight, model.conv1.weight)
    assert not torch.equal(unlearned.conv2.weight, model.conv2.weight)


@pytest.mark.parametrize("setting", [{"alpha": -1e-6}, {"variant": "true"}, {"chunk": 0}])
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "fisher-noise", digits_task, **setting)


def test_missing_retained_records_and_frozen_models_are_refused(digits_model, class_request, digits_task):
    with pytest.raises(MissingNeed, match="retain-data"):
        pal.forget(digits_model, replace(class_request, retain=None), "fisher-noise", digits_task)
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        pal.forget(frozen, class_request, "fisher-noise", digits_task)
