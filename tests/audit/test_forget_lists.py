"""Lists of classes to forget: near a downstream task, and at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.audit.forget_lists import class_means, forget_list, rank_classes
from palimpsest.core.errors import AbsentClass, InvalidAudit, InvalidHyperparameter


class Direct(nn.Module):
    """A head on the inputs themselves: the features are what the test says they are."""

    def __init__(self, width: int = 3, classes: int = 6):
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(x)


def around(directions: dict[int, list[float]], each: int = 8, seed: int = 0) -> pal.Records:
    """Records that lie close around one direction per label."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        [torch.tensor(d) + 0.05 * torch.randn(each, len(d), generator=random) for d in directions.values()]
    )
    return pal.Records(TensorDataset(rows, torch.tensor([k for k in directions for _ in range(each)])))


SOURCE = around({0: [1, 0, 0], 1: [0, 1, 0], 2: [0, 0, 1], 3: [0.9, 0.5, 0], 4: [0, -1, 0]})
DOWNSTREAM = around({70: [2, 0.1, 0], 71: [0, 0.1, 3]}, seed=1)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_the_ranking_is_that_of_cosines_by_hand(classes, others, seed):
    random = np.random.default_rng(seed)
    mine, labels = random.normal(size=(30, 4)), np.arange(30) % classes
    theirs, names = random.normal(size=(20, 4)), np.arange(20) % others

    def cosine(a: int, b: int) -> float:
        x, y = mine[labels == a].mean(0), theirs[names == b].mean(0)
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))

    expected = {a: max((cosine(a, b), b) for b in range(others)) for a in range(classes)}
    ranked = rank_classes(mine, labels, theirs, names)
    assert [item.label for item in ranked] == sorted(expected, key=lambda a: -expected[a][0])
    for item in ranked:
        assert item.similarity == pytest.approx(expected[item.label][0])
        assert item.nearest == expected[item.label][1]


def test_the_top_list_holds_the_classes_nearest_to_any_downstream_class(digits_task):
    assert sorted(forget_list(Direct(), SOURCE, digits_task, 2, DOWNSTREAM)) == [0, 2]
    assert forget_list(Direct(), SOURCE, digits_task, 3, DOWNSTREAM)[2] == 3
    assert forget_list(Direct(), SOURCE, digits_task, 1, DOWNSTREAM, among=[1, 3, 4]) == [3]


def test_a_list_makes_a_request(digits_task):
    parts = pal.split(
        SOURCE,
        pal.by_column("label", *forget_list(Direct(), SOURCE, digits_task, 2, DOWNSTREAM)),
        test=0,
        holdout=0,
    )
    assert parts.forgotten_labels == [0, 2]


def test_random_lists_come_from_the_seed_and_need_no_downstream_data(digits_task):
    def drawn(seed: int) -> list[int]:
        return forget_list(Direct(), SOURCE, digits_task, 2, kind="random", runtime=pal.Runtime(seed=seed))

    assert drawn(0) == drawn(0) and len(set(drawn(0))) == 2
    assert {label for seed in range(40) for label in drawn(seed)} == set(range(5))
    only = forget_list(Direct(), SOURCE, digits_task, 2, kind="random", among=[1, 4])
    assert only == [1, 4]


def test_the_model_stays_as_it_was(digits_task):
    model = Direct().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forget_list(model, SOURCE, digits_task, 1, DOWNSTREAM)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_cannot_be_listed_is_refused(digits_task):
    model = Direct()
    with pytest.raises(AbsentClass, match="label 9"):
        forget_list(model, SOURCE, digits_task, 1, DOWNSTREAM, among=[0, 9])
    for count in (0, 5):
        with pytest.raises(InvalidHyperparameter, match="between 1 and 4"):
            forget_list(model, SOURCE, digits_task, count, DOWNSTREAM)
    with pytest.raises(InvalidHyperparameter, match="nearest"):
        forget_list(model, SOURCE, digits_task, 1, DOWNSTREAM, kind="nearest")
    with pytest.raises(InvalidAudit, match="downstream task"):
        forget_list(model, SOURCE, digits_task, 1)
    with pytest.raises(InvalidAudit, match="no layer 'body'"):
        forget_list(model, SOURCE, digits_task, 1, DOWNSTREAM, layer="body")
    with pytest.raises(InvalidAudit, match="width 2 and 3"):
        rank_classes(np.ones((2, 2)), np.arange(2), np.ones((2, 3)), np.arange(2))
    with pytest.raises(InvalidAudit, match="no direction"):
        rank_classes(np.zeros((2, 2)), np.arange(2), np.ones((2, 2)), np.arange(2))
    with pytest.raises(InvalidAudit, match="NaN or Inf"):
        class_means(np.full((2, 2), np.nan), np.arange(2))
    with pytest.raises(InvalidAudit, match="2 rows of features and 3 labels"):
        class_means(np.ones((2, 2)), np.arange(3))
