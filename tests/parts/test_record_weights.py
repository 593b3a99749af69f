from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import DuplicateIds, InvalidHyperparameter, InvalidRecords
from palimpsest.parts.record_weights import check_weights, row_finder


@pytest.fixture
def records():
    return pal.Records(TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 3))


def test_rows_are_found_in_any_selection_read_in_any_order(records, digits_task):
    chosen = records.select(np.random.default_rng(0).permutation(20)[:13])
    rows, order = row_finder(chosen), torch.Generator().manual_seed(3)
    read = 0
    for batch in pal.Runtime(device="cpu").batches(chosen, digits_task, 4, shuffle=order):
        assert [chosen.ids[row] for row in rows(batch).tolist()] == batch["id"]
        read += len(batch["id"])
    assert read == 13


def test_rows_are_found_in_records_that_are_read_one_by_one(digits_task):
    data = [(torch.zeros(2), label) for label in (0, 1, 1, 0, 1)]
    chosen = pal.Records(data, columns={"label": [0, 1, 1, 0, 1]}).select([4, 0, 3])
    rows = row_finder(chosen)
    assert rows(chosen.batch([1, 0], digits_task.collate)).tolist() == [1, 0]


def test_a_batch_that_does_not_say_what_it_holds_is_refused(records):
    with pytest.raises(InvalidRecords, match='collate must keep the field "index"'):
        row_finder(records)({"input": torch.zeros(2, 1), "id": ["0", "1"]})


@pytest.mark.parametrize("other", [[5], [19], [0, 5]])
def test_a_batch_of_other_records_is_refused(records, digits_task, other):
    rows = row_finder(records.select([0, 1, 2]))
    with pytest.raises(InvalidRecords, match="not among those"):
        rows(records.batch(other, digits_task.collate))


def test_a_record_that_occurs_twice_is_named(records):
    with pytest.raises(DuplicateIds, match="'7'"):
        row_finder(records.select([7, 1, 7]))


def test_weights_that_fit_are_passed_on():
    assert check_weights([0, 0.5, 1], 3).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5, 0.5], "3 weights are needed"),
        ([[0.5], [0.5], [0.5]], "3 weights are needed"),
        ([0.0, 1.1, 0.0], "weight 1 is 1.1"),
        ([0.0, 0.2, -1e-3], "weight 2 is -0.001"),
        ([float("nan"), 0.0, 0.0], "weight 0 is nan"),
    ],
)
def test_weights_of_the_wrong_number_or_range_are_refused(weights, said):
    with pytest.raises(InvalidHyperparameter, match=said):
        check_weights(weights, 3)
