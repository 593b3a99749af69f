"""Fingerprints: they follow content, not place, and see what a model is made of."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import palimpsest as pal
from palimpsest.parts.fingerprint import architecture_fingerprint, record_digests, records_fingerprint


def records(values: torch.Tensor, labels: torch.Tensor, prefix: str = "r") -> pal.Records:
    return pal.Records(TensorDataset(values, labels), ids=[f"{prefix}{i}" for i in range(len(labels))])


def test_a_record_has_one_digest_wherever_it_stands_and_another_one_if_anything_changes():
    values, labels = torch.randn(6, 2, 3), torch.arange(6)
    mine = records(values, labels)
    digests = record_digests(mine)
    assert len(set(digests)) == 6
    assert record_digests(mine.select([4, 1])) == [digests[4], digests[1]]
    changed = values.clone()
    changed[2, 1, 1] += 1e-3
    after = record_digests(records(changed, labels))
    assert [a == b for a, b in zip(digests, after, strict=True)] == [True, True, False, True, True, True]
    assert record_digests(records(values, labels.flip(0)))[0] != digests[0]
    assert record_digests(records(values, labels, "other"))[0] != digests[0]


def test_records_that_are_read_one_by_one_are_known_by_ids_and_columns():
    class OnDisk(Dataset):
        targets = (0, 1, 0)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, item: int):
            raise AssertionError("nothing is read")

    mine = pal.Records(OnDisk(), ids=["a", "b", "c"])
    assert len(set(record_digests(mine))) == 3
    other = mine.with_column("label", [0, 0, 0])
    assert [a == b for a, b in zip(record_digests(mine), record_digests(other), strict=True)] == [
        True,
        False,
        True,
    ]
    assert records_fingerprint(mine) != records_fingerprint(other)


def test_an_architecture_is_known_by_its_parts_and_not_by_its_weights():
    def network(rate: float = 0.1, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Dropout(rate), nn.BatchNorm1d(width))

    plain = architecture_fingerprint(network())
    moved = copy.deepcopy(network())
    moved[2].running_mean += 1
    assert architecture_fingerprint(moved) == plain
    for other in (network(rate=0.2), network(width=5), nn.Sequential(*network(), nn.ReLU())):
        assert architecture_fingerprint(other) != plain
