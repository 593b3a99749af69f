from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidStream, MissingTaskId
from palimpsest.core.records import Records
from palimpsest.retain.short_form import parse_stream
from palimpsest.retain.streams import Experience, Stream, class_incremental, divided, from_parts
from palimpsest.retain.transforms import joined, permuted, relabelled, rotated


def toy(labels, shape=(2,), start=0):
    labels = torch.tensor(labels)
    inputs = (
        torch.arange(len(labels)).float().reshape(-1, *[1] * len(shape)).expand(len(labels), *shape).clone()
    )
    return Records(TensorDataset(inputs, labels), ids=[f"r{start + i}" for i in range(len(labels))])


def ids_of(stream):
    return [set(experience.records.ids) for experience in stream]


def test_a_class_incremental_stream_meets_every_training_record_once_and_every_class_in_one_experience(
    digits,
):
    stream = parse_stream("class:5x2", digits, test=0.25)
    trained = [name for experience in stream for name in experience.records.ids]
    tested = [name for experience in stream for name in experience.test.ids]
    assert sorted(trained + tested) == sorted(digits.ids)
    assert [experience.classes for experience in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert all(set(experience.test.column("label")) == set(experience.classes) for experience in stream)
    assert [experience.task for experience in stream] == [None] * 5


def test_labels_are_positions_in_the_order_of_the_classes_and_inputs_stay(digits):
    stream = class_incremental(digits, [2, 3], order=[7, 2, 9, 0, 4])
    assert stream.order == (7, 2, 9, 0, 4)
    by_id = dict(zip(digits.ids, digits.column("label"), strict=True))
    for experience in stream:
        for item, original in zip(experience.records, experience.records.column("original"), strict=True):
            assert by_id[item["id"]] == original == stream.order[int(item["label"])]
            break
        labels = experience.records.tensors["label"].numpy()
        assert (np.asarray(stream.order)[labels] == [by_id[name] for name in experience.records.ids]).all()
        where = [digits.ids.index(name) for name in experience.records.ids[:20]]
        assert torch.equal(experience.records.tensors["input"][:20], digits.tensors["input"][where])


def test_the_seed_draws_the_order_of_classes_but_not_the_split(digits):
    one, two, again = (parse_stream("class:5x2", digits, seed=seed) for seed in (1, 2, 1))
    assert one.order != two.order
    assert sorted(one.order) == sorted(two.order) == list(range(10))
    assert one.order == again.order and ids_of(one) == ids_of(again)
    tested = [{name for experience in stream for name in experience.test.ids} for stream in (one, two)]
    assert tested[0] == tested[1]


def test_a_task_incremental_stream_tells_the_task_id(digits):
    stream = parse_stream("task:5x2", digits)
    assert [experience.task for experience in stream] == [0, 1, 2, 3, 4]
    assert ids_of(stream) == ids_of(parse_stream("class:5x2", digits))


def test_sizes_may_differ(digits):
    assert [len(e.classes) for e in parse_stream("class:4,2,2", digits)] == [4, 2, 2]


def test_blurry_boundaries_put_the_share_of_each_home_elsewhere_and_lose_no_record(digits):
    sharp, blurry = parse_stream("class:5x2", digits), parse_stream("blurry:5x2@0.2", digits)
    assert set.union(*ids_of(sharp)) == set.union(*ids_of(blurry))
    for clear, mixed in zip(sharp, blurry, strict=True):
        stayed = set(clear.records.ids) & set(mixed.records.ids)
        assert len(stayed) == len(clear.records) - round(0.2 * len(clear.records))
        assert set(mixed.classes) == set(range(10))
        assert mixed.test.ids == clear.test.ids
    away = [len(set(sharp[0].records.ids) & set(other.records.ids)) for other in list(blurry)[1:]]
    assert max(away) - min(away) <= 1


def test_online_says_that_records_are_seen_once(digits):
    assert parse_stream("class:5x2:online", digits).online
    assert not parse_stream("class:5x2", digits).online


def test_a_permuted_experience_holds_the_same_values_in_one_order_for_train_and_test(digits):
    stream = parse_stream("domain:permuted:3", digits)
    base, held = divided(digits, 0.2)
    for experience in stream:
        pairs = [(experience.records, base), (experience.test, held)]
        changed = torch.cat([part.tensors["input"].flatten(1) for part, _ in pairs])
        plain = torch.cat([part.tensors["input"].flatten(1) for _, part in pairs])
        columns = {tuple(column.tolist()) for column in plain.T}
        assert {tuple(column.tolist()) for column in changed.T} == columns
        assert not torch.equal(changed, plain)
        assert experience.classes == tuple(range(10))
    assert not torch.equal(stream[0].records.tensors["input"], stream[1].records.tensors["input"])


def test_a_permutation_is_the_same_for_all_records_and_pads_first():
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    images = torch.rand(5, 1, 4, 4)
    found = permuted(images, order, pad=1)
    assert found.shape == (5, 1, 6, 6)
    for image, changed in zip(images, found, strict=True):
        padded = torch.zeros(6, 6)
        padded[1:5, 1:5] = image[0]
        assert torch.equal(changed.flatten(), padded.flatten()[order])


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_is_exact(turns):
    images = torch.rand(3, 2, 7, 7)
    torch.testing.assert_close(
        rotated(images, 90 * turns), torch.rot90(images, turns, (2, 3)), atol=1e-5, rtol=0
    )


def test_a_half_turn_of_an_image_that_is_not_square_is_exact():
    images = torch.rand(3, 1, 5, 9)
    torch.testing.assert_close(rotated(images, 180), images.flip(2, 3), atol=1e-5, rtol=0)


def test_a_rotation_agrees_with_scipy_inside_the_image():
    from scipy.ndimage import gaussian_filter, rotate

    smooth = gaussian_filter(np.random.default_rng(0).random((21, 33)), 2)
    image = torch.from_numpy(smooth).float()[None, None]
    expected = rotate(smooth, 30, reshape=False, order=1)
    inside = np.hypot(*np.meshgrid(np.arange(33) - 16, np.arange(21) - 10)) < 8
    assert np.abs(rotated(image, 30)[0, 0].numpy() - expected)[inside].max() < 1e-4


def test_texts_and_tables_make_streams_too():
    texts = pal.load_data("intents")
    stream = parse_stream("class:5x2", texts)
    assert stream[0].records.tensors["input"].dtype == torch.long
    table = Records(TensorDataset(torch.rand(40, 7), torch.arange(40) % 4))
    assert [len(e.records) for e in parse_stream("domain:permuted:2", table)] == [32, 32]


class Lazy(Dataset):
    """Items that do not lie in memory."""

    def __init__(self, records):
        self.records, self.targets = records, records.column("label")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, item):
        found = self.records[item]
        return found["input"], found["label"]


@pytest.mark.parametrize(
    "form", ["class:2x2", "domain:permuted:2", "domain:rotated:0,45", "power-law:2x2@0.5"]
)
def test_data_that_are_read_item_by_item_give_the_same_stream(digits, form):
    few = digits.select(np.flatnonzero(np.isin(digits.column("label"), [1, 3, 5, 7]))[:100])
    names = few.ids
    lazy = Records(Lazy(few), ids=names)
    fast, slow = parse_stream(form, few), parse_stream(form, lazy)
    for a, b in zip(fast, slow, strict=True):
        assert a.records.ids == b.records.ids and not b.records.in_memory
        for item in range(0, len(a.records), 7):
            torch.testing.assert_close(a.records[item]["input"], b.records[item]["input"], atol=1e-6, rtol=0)
            assert int(a.records[item]["label"]) == int(b.records[item]["label"])


def test_joined_records_keep_ids_fields_and_shared_columns():
    one, two = toy([0, 1]), toy([2, 3], start=5)
    both = joined([one, two])
    assert both.ids == ["r0", "r1", "r5", "r6"] and both.in_memory
    assert both.column("label").tolist() == [0, 1, 2, 3]


def test_labels_may_be_negative_or_far_apart_before_they_are_relabelled():
    records = relabelled(toy([-3, 100, -3]), {-3: 1, 100: 0})
    assert records.tensors["label"].tolist() == [1, 0, 1] == records.column("label").tolist()


def test_a_column_part_decides_what_is_tested():
    records = toy([0, 0, 1, 1, 0, 1]).with_column(
        "part", ["train", "test", "train", "test", "train", "holdout"]
    )
    stream = class_incremental(records, [1, 1])
    assert [e.records.ids for e in stream] == [["r0", "r4"], ["r2"]]
    assert [e.test.ids for e in stream] == [["r1"], ["r3"]]


def test_a_known_test_set_is_used_whole(digits):
    train, test = digits.select(np.arange(1000)), digits.select(np.arange(1000, 1797))
    stream = parse_stream("class:5x2", train, test=test)
    assert sum(len(e.test) for e in stream) == 797


BAD = [
    ("class:5x3", "classes were asked for"),
    ("class:0x2", "Cannot read|classes were asked"),
    ("klass:5x2", "Did you mean 'class'"),
    ("class:five", "5x2 is 5 experiences"),
    ("class:5x2@0.1", "takes no share"),
    ("domain:shuffled:3", "permuted' or 'rotated"),
    ("domain:permuted:many", "Cannot read the number"),
    ("blurry:5x2@1.5", r"\[0, 1\)"),
    ("power-law:permuted:3@2", r"\(0, 1\]"),
]


@pytest.mark.parametrize(("form", "said"), BAD)
def test_a_form_that_cannot_be_read_is_refused_in_words(digits, form, said):
    with pytest.raises(InvalidStream, match=said):
        parse_stream(form, digits)


def test_only_images_can_be_rotated():
    table = Records(TensorDataset(torch.rand(40, 7), torch.arange(40) % 4))
    with pytest.raises(InvalidStream, match="Only images"):
        parse_stream("domain:rotated:2", table)


def test_an_experience_without_records_is_refused():
    empty = toy([0, 1]).select([])
    with pytest.raises(InvalidStream, match="no records"):
        from_parts([(empty, toy([0, 1]))], "class")
    with pytest.raises(InvalidStream, match="no test records"):
        Stream((Experience(toy([0]), empty, 0, (0,)),), "class", 1)
    with pytest.raises(InvalidStream, match="at least one"):
        Stream((), "class", 1)


def test_a_class_that_returns_is_refused_unless_that_is_meant():
    parts = [(toy([0, 1]), toy([0, 1])), (toy([1, 2]), toy([2, 2]))]
    with pytest.raises(InvalidStream, match="Class 1 comes in experience 0 and again in 1"):
        from_parts(parts, "class")
    assert from_parts(parts, "class", returning=True).returning
    assert len(from_parts(parts, "domain")) == 2


def test_inputs_of_different_shapes_are_refused():
    with pytest.raises(InvalidStream, match=r"shape \(3,\), those before \(2,\)"):
        from_parts([(toy([0]), toy([0])), (toy([1], (3,)), toy([1], (3,)))], "class")


def test_a_missing_task_id_is_refused_and_so_is_one_that_must_not_be_told():
    good = toy([0, 1])
    with pytest.raises(MissingTaskId, match="no task id"):
        Stream((Experience(good, good, 0, (0, 1)),), "task", 2)
    with pytest.raises(InvalidStream, match="does not tell"):
        Stream((Experience(good, good, 0, (0, 1), task=0),), "class", 2)


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(InvalidStream, match="classes"):
        Stream((Experience(toy([0, 5]), toy([0]), 0, (0, 5)),), "class", 2)


def test_records_without_labels_are_refused():
    with pytest.raises(InvalidStream, match="integer column 'label'"):
        parse_stream("class:2x1", Records(TensorDataset(torch.rand(4, 2), torch.rand(4))))


def test_angles_are_drawn_from_half_a_turn_by_the_seed(digits):
    one, two = (parse_stream("domain:rotated:2", digits, seed=seed) for seed in (0, 1))
    assert not torch.equal(one[0].records.tensors["input"], two[0].records.tensors["input"])
    assert math.isclose(float(one[0].records.tensors["input"].max()), 1.0, rel_tol=0.05)
