from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from tests.suites.published import published

from palimpsest.core.errors import InvalidRecords
from palimpsest.data import load_data, parse_data
from palimpsest.retain import parse_stream


def test_mnist_has_five_hundred_of_each_digit_and_divides_into_a_stream():
    records = load_data("mnist-5k")
    assert len(records) == 5000 and records[0]["input"].shape == (1, 28, 28)
    assert np.bincount(records.column("label")).tolist() == [500] * 10
    images = records.tensors["input"]
    assert images.min() == 0 and images.max() == 1
    stream = parse_stream("class:5x2", records)
    assert [experience.classes for experience in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


@pytest.fixture
def archive(tmp_path):
    """Two alphabets, three characters, two drawers; a black stroke of one pixel column on white, as published."""
    from PIL import Image

    path = tmp_path / "images_background_small1.zip"
    with zipfile.ZipFile(path, "w") as opened:
        for number, (alphabet, character) in enumerate([("Greek", 1), ("Greek", 2), ("Latin", 1)]):
            for drawer in (1, 2):
                pixels = np.full((105, 105), 255, np.uint8)
                pixels[:, 15 * number : 15 * number + 15] = 0
                content = io.BytesIO()
                Image.fromarray(pixels).convert("1").save(content, "PNG")
                name = f"images_background_small1/{alphabet}/character{character:02d}/{700 + number:04d}_{drawer:02d}.png"
                opened.writestr(name, content.getvalue())
        opened.writestr("images_background_small1/readme.txt", "no image")
    return path


def test_omniglot_is_read_from_an_archive_a_folder_of_archives_and_an_unpacked_one(archive, tmp_path):
    from_file, from_folder = (
        load_data("omniglot", root=archive, side=7),
        parse_data(f"omniglot:{tmp_path}", side=7),
    )
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    unpacked = load_data("omniglot", root=tmp_path / "unpacked", side=7)
    for records in (from_file, from_folder, unpacked):
        assert records.ids[:3] == ["Greek/character01/01", "Greek/character01/02", "Greek/character02/01"]
        assert records.column("label").tolist() == [0, 0, 1, 1, 2, 2]
        assert set(records.column("alphabet")) == {"Greek", "Latin"}
        assert records.column("drawer").tolist() == [1, 2] * 3
        # strokes are bright: 15 of 105 columns are one of 7
        for row, column in ((0, 0), (2, 1), (4, 2)):
            image = records[row]["input"][0]
            assert (image[:, column] == 1).all() and image.sum() == 7


def test_what_is_no_archive_says_how_to_get_one(tmp_path):
    with pytest.raises(InvalidRecords, match="brendenlake"):
        load_data("omniglot", root=tmp_path)
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(InvalidRecords, match=r"bad\.zip cannot be read"):
        load_data("omniglot", root=tmp_path / "bad.zip")
    with pytest.raises(InvalidRecords, match="nowhere"):
        load_data("omniglot", root=tmp_path / "nowhere.zip")


def test_the_published_archive_has_twenty_drawings_of_136_characters():
    records = load_data("omniglot", root=published("omniglot") / "images_background_small1.zip")
    assert len(records) == 2720 and records[0]["input"].shape == (1, 28, 28)
    assert np.bincount(records.column("label")).tolist() == [20] * 136
    assert len(set(records.column("alphabet"))) == 5
