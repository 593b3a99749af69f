"""The fine-tuning loop, against closed forms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.audit.attacks.knowledge import CONFIDENCE_BOUND, Watched, log_odds
from palimpsest.audit.attacks.tuning import Budget, choose_learning_rate, level_head, step_batches, tune
from palimpsest.core.evidence import Evidence
from palimpsest.core.runtime import Runtime
from palimpsest.models import build_model

TASK = pal.tasks.Classification()
RUNTIME = Runtime(device="cpu")


def small_records(n: int = 12, shape: tuple[int, ...] = (4,)) -> pal.Records:
    random = torch.Generator().manual_seed(0)
    return pal.Records(TensorDataset(torch.randn(n, *shape, generator=random), torch.arange(n) % 3))


def test_one_step_of_sgd_is_the_softmax_regression_step():
    records = small_records()
    model = nn.Linear(4, 3).eval()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    batch = next(RUNTIME.batches(records, TASK))
    budget = Budget(steps=1, every=1, optimizer="sgd")
    tune(model, budget.optimizer_of(model, 0.5), [batch], Watched(records, TASK, RUNTIME), TASK, budget)
    x, y = batch["input"], nn.functional.one_hot(batch["label"], 3)
    error = ((x @ weight.T + bias).softmax(1) - y) / len(x)
    assert torch.allclose(model.weight, weight - 0.5 * error.T @ x, atol=1e-6)
    assert torch.allclose(model.bias, bias - 0.5 * error.sum(0), atol=1e-6)


def test_the_curve_holds_what_the_model_answered_after_each_step():
    records = small_records()
    batch = next(RUNTIME.batches(records, TASK))
    budget = Budget(steps=5, every=2, optimizer="sgd")
    torch.manual_seed(0)
    model = nn.Linear(4, 3).eval()
    twin = copy.deepcopy(model)
    watched = Watched(records, TASK, RUNTIME)
    curve = tune(model, budget.optimizer_of(model, 0.3), [batch], watched, TASK, budget)
    assert curve.steps == [0, 2, 4, 5]
    optimizer = torch.optim.SGD(twin.parameters(), 0.3, momentum=0.9)
    for step in range(6):
        if step in curve.steps:
            right = (twin(batch["input"]).argmax(1) == batch["label"]).numpy()
            assert (curve.right[curve.steps.index(step)] == right).all()
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(batch["input"]), batch["label"]).backward()
        optimizer.step()


def test_batch_norm_statistics_stay_and_weights_move():
    records = small_records(6, (1, 8, 8))
    model = build_model("small_resnet", (1, 8, 8), 3, seed=0).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    budget = Budget(steps=3, every=1)
    batch = next(RUNTIME.batches(records, TASK))
    tune(model, budget.optimizer_of(model, 1e-2), [batch], Watched(records, TASK, RUNTIME), TASK, budget)
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in parameters), name


def test_a_loss_that_becomes_nan_keeps_the_last_values():
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(0.5 - self.weight.abs()).expand(len(x), 3) + self.weight

    records = small_records()
    model = Exploding().eval()
    budget = Budget(steps=4, every=1, optimizer="sgd")
    batch = next(RUNTIME.batches(records.select(np.zeros(6, int)), TASK))
    watched = Watched(records, TASK, RUNTIME)
    curve = tune(model, budget.optimizer_of(model, 100.0), [batch], watched, TASK, budget)
    assert curve.diverged and len(curve.accuracy) == 5
    assert curve.accuracy[-1] == curve.accuracy[-2]


@given(st.integers(1, 12), st.integers(0, 12))
def test_the_search_finds_the_first_success_on_any_grid(size, first):
    grid = [10.0**power for power in range(size)]
    tried: list[float] = []

    def run(rate: float) -> bool:
        tried.append(rate)
        return rate >= 10.0**first

    assert choose_learning_rate(run, grid) == grid[min(first, size - 1)]
    assert len(tried) <= np.ceil(np.log2(size)) + 1 and len(set(tried)) == len(tried)


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=3), st.integers(0, 2))
def test_log_odds_are_those_of_the_softmax_probability(logits, label):
    probability = torch.tensor([logits], dtype=torch.float64).softmax(1)[0, label]
    expected = torch.logit(probability).clamp(-CONFIDENCE_BOUND, CONFIDENCE_BOUND)
    found = log_odds(torch.tensor([logits], dtype=torch.float64), torch.tensor([label]))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_levelling_touches_only_the_silenced_biases(digits_model):
    model = copy.deepcopy(digits_model)
    with torch.no_grad():
        model.head.bias[3] = -1e9
    level_head(model, [3], TASK)
    others = [label for label in range(10) if label != 3]
    assert model.head.bias[3] == digits_model.head.bias[others].min()
    assert torch.equal(model.head.bias[others], digits_model.head.bias[others])
    assert torch.equal(model.head.weight, digits_model.head.weight)


def test_levelling_without_forgotten_classes_changes_nothing(digits_model):
    model = copy.deepcopy(digits_model)
    level_head(model, [], TASK)
    assert torch.equal(model.head.bias, digits_model.head.bias)


def test_batches_of_an_attack_are_full_and_as_many_as_steps(class_evidence):
    records = class_evidence.records("retain")
    batches = step_batches(class_evidence, records, 40, 64, np.random.default_rng(0))
    assert len(batches) == 40 and {len(batch["id"]) for batch in batches} == {64}
    first_epoch = [identifier for batch in batches[: len(records) // 64] for identifier in batch["id"]]
    assert len(set(first_epoch)) == len(first_epoch)


def test_labels_are_read_from_the_field_that_the_task_names():
    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, item: int) -> dict[str, object]:
            return {"input": torch.ones(4) * item, "kind": item % 3}

    records = pal.Records(Pairs())
    watched = Watched(records, pal.tasks.Classification(label="kind"), RUNTIME)
    assert watched.labels.tolist() == [0, 1, 2] * 3
    assert isinstance(watched.right(nn.Linear(4, 3)), np.ndarray)


def test_a_part_is_sampled_the_same_way_for_every_model(class_evidence):
    first = Watched.part(class_evidence, "retain", 50)
    again = Watched.part(Evidence.judging(class_evidence, class_evidence.unlearned), "retain", 50)
    assert len(first.labels) == 50
    assert [b["id"] for b in first.batches] == [b["id"] for b in again.batches]
