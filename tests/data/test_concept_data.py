from __future__ import annotations

import numpy as np
import pytest
import torch

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.data.intents import CONCEPTS, MASK, PAD, UNKNOWN, decode, encode, vocabulary, words_of
from palimpsest.data.planted_shapes import CLASSES, SHAPE, SHAPES


def test_there_are_a_hundred_texts_of_each_of_ten_intents():
    records = pal.load_data("intents")
    assert np.bincount(records.column("label")).tolist() == [100] * 10
    assert len(set(records.column("intent"))) == 10 and records.ids[700] == "transfer-00"
    assert records[0]["input"].shape == (20,)


def test_ids_are_the_words_of_the_text():
    records = pal.load_data("intents", length=30)
    known = set(vocabulary())
    for item, text in zip(records, records.column("text"), strict=True):
        said = [word if word in known else "<unknown>" for word in words_of(text)]
        assert decode(item["input"].tolist()).split() == said


def test_texts_are_cut_padded_and_unknown_words_marked():
    ids = encode("Wake me at zyzzogeton", 6)
    assert [vocabulary()[i] for i in ids[:3]] == ["wake", "me", "at"]
    assert ids[3:].tolist() == [UNKNOWN, PAD, PAD]
    assert len(encode("one two three four", 2)) == 2 and vocabulary()[MASK] == "***"


def test_a_concept_column_says_whether_one_of_its_words_is_said():
    records = pal.load_data("intents")
    for name, listed in CONCEPTS.items():
        by_hand = [bool(set(words_of(text)) & set(listed.split())) for text in records.column("text")]
        assert records.column(name).tolist() == by_hand and 0 < sum(by_hand) < 1000


def test_a_planted_shape_is_brighter_than_what_is_around_it():
    records = pal.load_data("planted-shapes", n=200, noise=0.05)
    images = records.tensors["input"][:, 0]
    for name in SHAPES:
        shown = records.column(name)
        assert 0 < shown.sum() < 200
        for image, (x, y) in zip(
            images[torch.from_numpy(shown)], records.column(f"{name}-place")[shown], strict=True
        ):
            window = image[y - SHAPE // 2 : y + SHAPE // 2 + 1, x - SHAPE // 2 : x + SHAPE // 2 + 1]
            assert window.shape == (SHAPE, SHAPE) and (window > 0.5).sum() >= 8


def test_every_class_has_its_shapes_and_strays_come_as_often_as_said():
    records = pal.load_data("planted-shapes", n=2000, stray=0.3)
    extra = np.zeros(2000)
    for label, names in enumerate(CLASSES):
        mine = records.column("label") == label
        for name in names:
            assert records.column(name)[mine].all()
        extra[mine] = sum(records.column(name)[mine] for name in SHAPES if name not in names)
    assert extra.max() == 1 and abs(extra.mean() - 0.3) < 0.05


def test_the_same_seed_gives_the_same_images():
    first, again, other = (
        pal.load_data("planted-shapes", n=20, seed=seed).tensors["input"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("settings", [{"n": 3}, {"noise": -1.0}, {"stray": 2.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        pal.load_data("planted-shapes", **settings)
