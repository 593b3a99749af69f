from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, UnknownName
from palimpsest.data import load_data, parse_data
from palimpsest.data.fashion_mnist import DEBIAN


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, n in (("train", 12), ("t10k", 5)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", random.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return tmp_path


def test_digits_are_the_real_ones():
    records = load_data("digits")
    assert len(records) == 1797 and records[0]["input"].shape == (1, 8, 8)
    assert np.bincount(records.column("label")).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert records.ids[7] == "digit-0007" and 0 <= records[5]["input"].min() <= records[5]["input"].max() <= 1


def test_fashion_mnist_reads_a_torchvision_root(idx_folder):
    records = load_data("fashion-mnist", root=idx_folder, part="all")
    assert len(records) == 17 and records[0]["input"].shape == (1, 28, 28)
    assert records.ids[0] == "train-00000" and records.ids[-1] == "t10k-00004"
    assert records.column("class")[9] == "ankle boot"


def test_fashion_mnist_files_cut_short_or_absent_are_refused(idx_folder, tmp_path):
    file = next(idx_folder.glob("**/train-images*"))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InvalidRecords, match="train-images"):
        load_data("fashion-mnist", root=idx_folder)
    with pytest.raises(InvalidRecords, match="dataset-fashion-mnist"):
        load_data("fashion-mnist", root=tmp_path / "nowhere")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_debian_package_holds_sixty_thousand_images():
    records = load_data("fashion-mnist")
    assert len(records) == 60000 and set(np.bincount(records.column("label"))) == {6000}


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(
                tmp_path / name / f"{index}.png"
            )
    return tmp_path


@pytest.mark.parametrize("preload", [True, False])
def test_an_image_folder_gives_paths_as_ids_and_folders_as_classes(photos, preload):
    records = load_data("image-folder", root=photos, size=32, preload=preload)
    assert records.ids == [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(3)]
    assert records.column("class").tolist() == ["cat"] * 3 + ["dog"] * 3
    assert records[4]["input"].shape == (3, 32, 32) and int(records[4]["label"]) == 1
    assert records.in_memory == preload


def test_a_damaged_image_and_an_empty_folder_are_named(photos, tmp_path):
    (photos / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(InvalidRecords, match=r"dog/1\.png"):
        load_data("image-folder", root=photos, size=32)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidRecords, match="one per class"):
        load_data("image-folder", root=empty)


def test_arrays_come_from_memory_or_a_file_with_their_columns(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(6, 4)), np.arange(6) % 2
    np.savez(tmp_path / "table.npz", x=x, y=y, ids=np.array(list("abcdef")), subject=np.array(list("pqpqpq")))
    for records in (
        parse_data(f"arrays:{tmp_path / 'table.npz'}"),
        load_data("arrays", x=x, y=y, ids=list("abcdef")),
    ):
        assert records.ids == list("abcdef") and records[1]["input"].dtype == torch.float32
        assert torch.allclose(records[1]["input"], torch.tensor(x[1], dtype=torch.float32))
    assert parse_data(f"arrays:{tmp_path / 'table.npz'}").column("subject").tolist() == list("pqpqpq")


def test_arrays_with_pickled_objects_or_of_unequal_length_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"x": 1}))
    for name in ("bad.npz", "pickle.npz", "absent.npz"):
        with pytest.raises(InvalidRecords, match="cannot be read"):
            load_data("arrays", path=tmp_path / name)
    with pytest.raises(InvalidRecords, match="lengths must agree"):
        load_data("arrays", x=np.zeros((3, 2)), y=np.zeros(2))


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(UnknownName, match="Did you mean 'digits'"):
        load_data("digit")
    with pytest.raises(InvalidHyperparameter):
        load_data("digits", colour=True)
    with pytest.raises(InvalidHyperparameter, match="after the colon"):
        parse_data("digits:folder")
