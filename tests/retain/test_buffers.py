from __future__ import annotations

from collections import Counter, deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.retain.buffers import (
    ClassBalanced,
    Herding,
    Reservoir,
    Ring,
    balanced_rows,
    herding_order,
    known,
    reservoir_slots,
    shares,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def offer(buffer, count, classes=3, batch=7, start=0):
    for first in range(start, start + count, batch):
        items = torch.arange(first, min(first + batch, start + count))
        buffer.add(input=items.float()[:, None], label=items % classes)


def kept(buffer):
    return buffer.all()["input"][:, 0].long().tolist()


@pytest.mark.parametrize("batch", [3, 40])
def test_a_reservoir_keeps_every_record_with_the_same_chance(batch):
    runs, items, size = 2000, 40, 10
    times = Counter()
    for seed in range(runs):
        buffer = Reservoir(size, seeded(seed))
        offer(buffer, items, batch=batch)
        assert len(buffer) == size
        times.update(kept(buffer))
    observed = [times[item] for item in range(items)]
    expected = runs * size / items
    error = (expected * (1 - size / items)) ** 0.5
    assert max(abs(count - expected) for count in observed) < 4.5 * error
    # counts of one run exclude each other, so chi-square has items - 1 degrees scaled by (1 - size / items)
    statistic = sum((count - expected) ** 2 for count in observed) / (expected * (1 - size / items))
    assert stats.chi2.sf(statistic, items - 1) > 1e-4


@given(
    size=st.integers(1, 12),
    draws=st.lists(st.integers(0, 10**6), min_size=1, max_size=60),
)
@settings(max_examples=50, deadline=None)
def test_slots_of_a_reservoir_are_those_of_the_textbook(size, draws):
    draws = [draw % (number + 1) for number, draw in enumerate(draws)]
    numbers = torch.arange(len(draws))
    expected = []
    for number, draw in enumerate(draws):
        expected.append(number if number < size else draw if draw < size else -1)
    assert reservoir_slots(numbers, torch.tensor(draws), size).tolist() == expected


def test_of_two_records_for_one_slot_in_one_batch_the_later_one_stays():
    class Fixed(Reservoir):
        pass

    for seed in range(200):
        buffer, one_by_one = Fixed(1, seeded(seed)), Reservoir(1, seeded(seed))
        buffer.add(input=torch.arange(9.0)[:, None], label=torch.zeros(9))
        draws = (torch.rand(9, generator=seeded(seed), dtype=torch.float64) * torch.arange(1, 10)).long()
        last = max(item for item in range(9) if item == 0 or draws[item] == 0)
        assert kept(buffer) == [last]
        assert len(one_by_one) == 0


@pytest.mark.parametrize("kind", ["reservoir", "balanced", "ring"])
@pytest.mark.parametrize("size", [3, 10, 11, 50])
def test_sizes_are_exact(kind, size):
    buffer = {
        "reservoir": lambda: Reservoir(size, seeded(0)),
        "balanced": lambda: ClassBalanced(size, seeded(0)),
        "ring": lambda: Ring(size, 3, seeded(0)),
    }[kind]()
    offer(buffer, 2)
    assert len(buffer) == 2
    offer(buffer, 300, start=2)
    assert len(buffer) == size
    if kind != "reservoir":
        counts = torch.bincount(buffer.all()["label"], minlength=3).tolist()
        assert sorted(counts, reverse=True) == shares(size, 3)


def test_a_ring_holds_the_last_records_of_each_class():
    buffer = Ring(8, 3, seeded(0))
    last = [deque(maxlen=share) for share in (3, 3, 2)]
    for item in torch.randperm(100, generator=seeded(1)).tolist():
        buffer.add(input=torch.tensor([[float(item)]]), label=torch.tensor([item % 3]))
        last[item % 3].append(item)
    held = {label: set() for label in range(3)}
    for item in kept(buffer):
        held[item % 3].add(item)
    assert [held[label] for label in range(3)] == [set(items) for items in last]


def test_a_ring_may_be_shared_out_by_task():
    buffer = Ring(4, 2, seeded(0), by="task")
    for task in (0, 1):
        buffer.add(input=torch.full((9, 1), float(task)), label=torch.arange(9), task=torch.full((9,), task))
    assert sorted(buffer.all()["task"].tolist()) == [0, 0, 1, 1]
    with pytest.raises(InvalidHyperparameter, match="groups 0 to 1, not 2"):
        buffer.add(input=torch.zeros(1, 1), label=torch.zeros(1), task=torch.tensor([2]))


def test_a_balanced_buffer_is_a_uniform_sample_of_every_class():
    times, runs = Counter(), 1500
    for seed in range(runs):
        buffer = ClassBalanced(6, seeded(seed))
        offer(buffer, 30, classes=1)
        buffer.add(input=torch.arange(30.0, 60)[:, None], label=torch.ones(30, dtype=torch.long))
        assert torch.bincount(buffer.all()["label"]).tolist() == [3, 3]
        times.update(kept(buffer))
    for group in (range(30), range(30, 60)):
        expected = runs * 3 / 30
        statistic = sum((times[item] - expected) ** 2 for item in group) / (expected * 0.9)
        assert stats.chi2.sf(statistic, 29) > 1e-4


def test_a_class_that_has_shown_few_records_does_not_lend_its_slots():
    buffer = ClassBalanced(10, seeded(0))
    buffer.add(input=torch.zeros(2, 1), label=torch.zeros(2, dtype=torch.long))
    buffer.add(input=torch.ones(50, 1), label=torch.ones(50, dtype=torch.long))
    assert torch.bincount(buffer.all()["label"]).tolist() == [2, 5]


def test_herding_agrees_with_trying_every_record():
    features = torch.randn(12, 4, generator=seeded(3), dtype=torch.float64)
    picked, mean = [], features.mean(0)
    for _ in range(5):
        free = [item for item in range(12) if item not in picked]
        picked.append(min(free, key=lambda item: (mean - features[[*picked, item]].mean(0)).norm().item()))
    assert herding_order(features, 5, normalise=False).tolist() == picked


def test_herding_cuts_old_lists_at_the_end_and_gives_new_classes_their_share():
    buffer = Herding(10, seeded(0))
    features = torch.randn(40, 3, generator=seeded(1))
    inputs = torch.arange(40.0)[:, None]
    buffer.add(features[:20], input=inputs[:20], label=torch.zeros(20, dtype=torch.long))
    first = kept(buffer)
    assert len(first) == 10
    buffer.add(features[20:], input=inputs[20:], label=torch.tensor([1, 2] * 10))
    assert torch.bincount(buffer.all()["label"]).tolist() == [4, 3, 3]
    assert kept(buffer)[:4] == first[:4]
    with pytest.raises(InvalidHyperparameter, match="exemplars already"):
        buffer.add(features[:2], input=inputs[:2], label=torch.zeros(2, dtype=torch.long))


def test_draws_are_different_records_and_uniform():
    buffer = Reservoir(20, seeded(0))
    offer(buffer, 20)
    times = Counter()
    for _ in range(1000):
        drawn = buffer.draw(5)["input"][:, 0].long().tolist()
        assert len(set(drawn)) == 5
        times.update(drawn)
    statistic = sum((times[item] - 250) ** 2 for item in range(20)) / (250 * 0.75)
    assert stats.chi2.sf(statistic, 19) > 1e-4
    assert len(buffer.draw(100)["label"]) == 20
    assert Reservoir(3, seeded(0)).draw(5) == {}


def test_balanced_draws_take_classes_alike_as_far_as_they_go():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 10)
    for seed in range(20):
        rows = balanced_rows(labels, 12, seeded(seed))
        assert len(rows.unique()) == 12
        counts = torch.bincount(labels[rows], minlength=3).tolist()
        assert counts[1] == 3 and abs(counts[0] - counts[2]) <= 1


@pytest.mark.parametrize("kind", ["reservoir", "balanced", "ring", "herding"])
def test_a_buffer_that_is_resumed_goes_on_as_if_nothing_had_been(kind):
    def fresh():
        return {
            "reservoir": lambda: Reservoir(9, seeded(5)),
            "balanced": lambda: ClassBalanced(9, seeded(5)),
            "ring": lambda: Ring(9, 6, seeded(5)),
            "herding": lambda: Herding(9, seeded(5)),
        }[kind]()

    def feed(buffer, part):
        items = torch.arange(30) + 30 * part
        extra = {"features": items[:, None].float().sin()} if kind == "herding" else {}
        buffer.add(input=items[:, None].float(), label=items % 3 + 3 * part, **extra)

    whole, first = fresh(), fresh()
    feed(whole, 0), feed(first, 0)
    state = first.state_dict()
    second = fresh()
    second.load_state_dict(state)
    feed(whole, 1), feed(second, 1)
    assert kept(whole) == kept(second)
    for _ in range(3):
        assert torch.equal(whole.draw(4)["input"], second.draw(4)["input"])


def test_every_field_stays_with_its_record():
    buffer = Reservoir(16, seeded(0))
    for first in range(0, 400, 13):
        items = torch.arange(first, first + 13)
        buffer.add(
            input=items[:, None, None].float().expand(-1, 2, 2),
            label=items % 5,
            logits=items[:, None] * torch.tensor([1.0, 2.0]),
            features=-items[:, None].float(),
            task=items // 100,
        )
    rows = buffer.draw(16)
    items = -rows["features"][:, 0].long()
    assert torch.equal(rows["input"][:, 0, 0].long(), items) and torch.equal(rows["label"], items % 5)
    assert torch.equal(rows["logits"][:, 1].long(), 2 * items) and torch.equal(rows["task"], items // 100)
    assert buffer.bytes == 16 * (16 + 8 + 8 + 4 + 8)


def test_logits_of_a_head_that_grew_are_unknown_for_older_records():
    buffer = Reservoir(4, seeded(0))
    buffer.add(input=torch.zeros(2, 1), logits=torch.ones(2, 2))
    buffer.add(input=torch.ones(2, 1), logits=torch.ones(2, 3))
    rows = buffer.all()
    assert known(rows["logits"]).sum(1).tolist() == [2, 2, 3, 3]


def test_stored_values_carry_no_graph_and_are_copies():
    buffer, logits = Reservoir(2, seeded(0)), torch.ones(2, 2, requires_grad=True)
    inputs = torch.zeros(2, 1)
    buffer.add(input=inputs, logits=logits * 2)
    inputs += 5
    assert not buffer.all()["logits"].requires_grad
    assert buffer.all()["input"].sum() == 0


def test_a_buffer_that_is_too_small_is_refused():
    for make in (
        lambda: Reservoir(0, seeded(0)),
        lambda: Ring(2, 3, seeded(0)),
        lambda: Herding(-1, seeded(0)),
    ):
        with pytest.raises(InvalidHyperparameter, match="too small"):
            make()
    with pytest.raises(InvalidHyperparameter, match="too small for 3 classes"):
        offer(ClassBalanced(2, seeded(0)), 5)


def test_other_fields_or_shapes_than_those_stored_are_refused():
    buffer = Reservoir(4, seeded(0))
    buffer.add(input=torch.zeros(1, 2))
    with pytest.raises(InvalidHyperparameter, match="holds"):
        buffer.add(input=torch.zeros(1, 2), label=torch.zeros(1))
