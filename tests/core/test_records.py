from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

import palimpsest as pal
from palimpsest.core.errors import DuplicateIds, InvalidRecords, UnknownName


def numbered(n: int, classes: int = 3, **kwargs) -> pal.Records:
    data = TensorDataset(torch.arange(n, dtype=torch.float32)[:, None], torch.arange(n) % classes)
    return pal.Records(data, **kwargs)


class Lazy(Dataset):
    """A dataset that decodes at access, with items as dicts."""

    def __len__(self):
        return 6

    def __getitem__(self, item):
        return {"input": torch.tensor([float(item)]), "label": item % 2, "text": f"row {item}"}


def test_an_item_carries_its_fields_its_id_and_its_position():
    item = numbered(4, ids=["a", "b", "c", "d"])[2]
    assert item["id"] == "c" and item["index"] == 2
    assert item["input"].tolist() == [2.0] and int(item["label"]) == 2


def test_ids_that_repeat_are_refused_by_name():
    with pytest.raises(DuplicateIds, match="'b'"):
        numbered(3, ids=["a", "b", "b"])


@pytest.mark.parametrize("wrong", [{"ids": ["a"]}, {"columns": {"subject": ["x", "y"]}}])
def test_ids_or_columns_of_another_length_are_refused(wrong):
    with pytest.raises(InvalidRecords):
        numbered(3, **wrong)


def test_labels_of_a_tensor_dataset_and_targets_of_torchvision_become_a_column():
    assert numbered(4, classes=2).column("label").tolist() == [0, 1, 0, 1]
    lazy = Lazy()
    lazy.targets = [0, 1, 0, 1, 0, 1]
    assert pal.Records(lazy).column("label").tolist() == [0, 1, 0, 1, 0, 1]


def test_an_unknown_column_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'subject'"):
        numbered(2, columns={"subject": ["x", "y"]}).column("subjet")


def test_selecting_is_a_view_that_keeps_ids_and_positions():
    records = numbered(10, columns={"even": np.arange(10) % 2 == 0})
    chosen = records.select([7, 3]).select([1])
    assert chosen.ids == ["3"] and chosen[0]["index"] == 3 and not chosen.column("even")[0]


@given(st.lists(st.integers(0, 19), max_size=20), st.lists(st.integers(0, 19), max_size=20))
def test_the_union_of_two_views_is_the_union_of_their_positions_in_order(left, right):
    records = numbered(20)
    union = records.select(sorted(set(left))).union(records.select(sorted(set(right))))
    assert union.positions.tolist() == sorted(set(left) | set(right))


def test_the_union_of_records_of_two_sources_keeps_ids_and_shared_columns():
    left = numbered(2, ids=["a", "b"], columns={"subject": ["x", "y"], "only": [1, 2]})
    right = numbered(2, ids=["c", "d"], columns={"subject": ["z", "z"]})
    both = left.union(right)
    assert both.ids == ["a", "b", "c", "d"]
    assert both.column("subject").tolist() == ["x", "y", "z", "z"] and not both.has_column("only")
    assert both[2]["input"].tolist() == [0.0]


def test_a_batch_in_memory_equals_a_batch_that_was_collated(digits_task):
    records = numbered(9)
    quick = records.batch([4, 1, 8], digits_task.collate)
    slow = digits_task.collate([records[i] for i in (4, 1, 8)])
    assert quick["id"] == slow["id"] == ["4", "1", "8"]
    for key in ("input", "label", "index"):
        assert torch.equal(quick[key], slow[key])


def test_a_dataset_that_decodes_at_access_is_read_in_batches_too(digits_task):
    records = pal.Records(Lazy())
    batches = list(pal.Runtime().batches(records, digits_task, batch_size=4))
    assert [len(batch["id"]) for batch in batches] == [4, 2]
    assert batches[1]["input"].tolist() == [[4.0], [5.0]] and batches[1]["text"] == ["row 4", "row 5"]


def test_a_column_can_be_added_to_a_selection():
    records = numbered(5).select([1, 3]).with_column("subject", ["p1", "p3"])
    assert records.column("subject").tolist() == ["p1", "p3"] and records.select([1]).column(
        "subject"
    ).tolist() == ["p3"]


@pytest.mark.parametrize("source", [numbered(6), pal.Records(Lazy())])
def test_records_without_a_field_have_it_neither_in_items_nor_in_batches_nor_as_a_column(source, digits_task):
    bare = source.select([1, 4, 5]).without("label", "text").select([0, 2])
    assert set(bare[0]) == {"input", "id", "index"} and bare.ids == ["1", "5"]
    assert set(bare.batch([0, 1], digits_task.collate)) == {"input", "id", "index"}
    assert not bare.has_column("label") and not bare.has_field("label") and bare.has_field("input")
    assert source.has_field("label") and "label" in source[0]
    assert bare.union(source.select([0]).without("label", "text")).ids == ["0", "1", "5"]


def test_a_field_is_found_without_being_read():
    class Shy(dict):
        def __getitem__(self, key):
            raise AssertionError(f"'{key}' was read")

    assert pal.Records([Shy(input=1.0, label=0)]).has_field("label")
    assert not pal.Records([Shy(input=1.0)]).has_field("label")
    assert pal.Records([(1.0, 0)]).has_field("label") and not pal.Records([(1.0,)]).has_field("label")
    assert pal.Records([1.0]).has_field("input") and not pal.Records([1.0]).has_field("label")
