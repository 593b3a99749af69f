from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.runtime import Runtime
from palimpsest.parts.pairing import alternating, cycled, forget_then_retain, mixed, paired, shuffled

TASK, RUNTIME = pal.tasks.Classification(), Runtime(device="cpu")


def records(n, prefix="r"):
    data = TensorDataset(torch.arange(n).float()[:, None], torch.zeros(n, dtype=torch.long))
    return pal.Records(data, ids=[f"{prefix}{i}" for i in range(n)])


def order(seed=0):
    return torch.Generator().manual_seed(seed)


@given(retain=st.integers(1, 40), forget=st.integers(1, 40), size=st.integers(1, 12))
def test_the_retained_records_define_the_epoch_of_pairs(retain, forget, size):
    pairs = list(paired(records(retain), records(forget, "f"), TASK, RUNTIME, size, order()))
    kept = [name for batch, _ in pairs for name in batch["id"]]
    left_over = retain % size == 1 and size > 1 and retain > 1
    assert len(kept) == len(set(kept)) == retain - left_over
    assert all(name.startswith("f") for _, batch in pairs for name in batch["id"])


def test_the_forget_records_are_cycled_evenly_and_shuffled_anew():
    pairs = list(paired(records(64), records(8, "f"), TASK, RUNTIME, 8, order(), forget_batch_size=4))
    passes = [[name for _, batch in pairs[i : i + 2] for name in batch["id"]] for i in range(0, 8, 2)]
    assert all(sorted(names) == [f"f{i}" for i in range(8)] for names in passes)
    assert len({tuple(names) for names in passes}) > 1


def test_alternating_yields_the_pairs_one_at_a_time():
    arguments = (records(10), records(4, "f"), TASK, RUNTIME, 4)
    sides = [(side, batch["id"]) for side, batch in alternating(*arguments, order())]
    pairs = [(kept["id"], gone["id"]) for kept, gone in paired(*arguments, order())]
    assert [side for side, _ in sides] == ["forget", "retain"] * 3
    assert [(sides[i + 1][1], sides[i][1]) for i in range(0, 6, 2)] == pairs


def test_sequential_passes_show_every_record_once_and_forget_first():
    found = list(forget_then_retain(records(10), records(6, "f"), TASK, RUNTIME, 4, order()))
    assert [side for side, _ in found] == ["forget"] * 2 + ["retain"] * 3
    names = Counter(name for _, batch in found for name in batch["id"])
    assert names == Counter([f"r{i}" for i in range(10)] + [f"f{i}" for i in range(6)])


@pytest.mark.parametrize("same_data", [True, False])
def test_a_mixture_marks_the_forget_records(same_data):
    if same_data:
        everything = records(30)
        forget, train = everything.select([1, 5, 8]), everything
    else:
        forget = records(3, "f")
        train = forget.union(records(27))
    gone = set(forget.ids)
    seen = []
    for batch, flags in mixed(train, forget, TASK, RUNTIME, 7, order()):
        assert flags.tolist() == [name in gone for name in batch["id"]]
        seen += batch["id"]
    assert sorted(seen) == sorted(train.ids)


def test_every_epoch_has_another_order_and_the_same_seed_the_same():
    generator = order()
    first, second = (
        [name for batch in shuffled(records(20), TASK, RUNTIME, 8, generator) for name in batch["id"]]
        for _ in range(2)
    )
    again = [name for batch in shuffled(records(20), TASK, RUNTIME, 8, order()) for name in batch["id"]]
    assert first != second and sorted(first) == sorted(second)
    assert first == again


def test_a_single_left_over_record_waits_for_another_epoch():
    generator = order()
    left_out = set()
    for _ in range(20):
        names = [name for batch in shuffled(records(9), TASK, RUNTIME, 8, generator) for name in batch["id"]]
        assert len(names) == 8
        left_out |= set(records(9).ids) - set(names)
    assert len(left_out) > 3


def test_a_single_record_is_still_trained_on():
    assert [batch["id"] for batch in shuffled(records(1), TASK, RUNTIME, 8, order())] == [["r0"]]
    assert len(list(shuffled(records(5), TASK, RUNTIME, 1, order()))) == 5


def test_cycling_never_ends():
    names = [batch["id"][0] for batch in islice(cycled(records(3), TASK, RUNTIME, 1, order()), 9)]
    assert Counter(names) == {"r0": 3, "r1": 3, "r2": 3}
