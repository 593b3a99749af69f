from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    AbsentClass,
    EmptyForgetSet,
    ForgetCoversEverything,
    InvalidSplit,
    UnknownIds,
    UnknownName,
)


def records_of(labels, **columns):
    labels = torch.as_tensor(labels)
    return pal.Records(TensorDataset(torch.zeros(len(labels), 1), labels), columns=columns)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=20, max_size=60),
    st.floats(0.05, 0.4),
    st.floats(0.05, 0.4),
    st.integers(0, 5),
)
def test_the_parts_divide_the_records_with_the_asked_sizes(labels, test, holdout, seed):
    records = records_of(labels)
    parts = pal.split(records, pal.by_fraction(0.5), test=test, holdout=holdout, seed=seed)
    ids = [identifier for part in parts.parts.values() for identifier in part.ids]
    assert sorted(ids) == sorted(records.ids)
    assert len(parts.test or []) == round(test * len(labels)) and len(parts.holdout or []) == round(
        holdout * len(labels)
    )


def test_test_and_holdout_hold_every_label_in_proportion(digits):
    parts = pal.split(digits, pal.by_column("label", 3), test=0.2, holdout=0.2)
    share = np.bincount(digits.column("label")) / len(digits)
    for part in (parts.test, parts.holdout):
        assert np.abs(np.bincount(part.column("label"), minlength=10) - share * len(part)).max() <= 1


def test_requests_without_named_ids_share_their_training_set(digits):
    one = pal.split(digits, pal.by_column("label", 3), seed=4)
    two = pal.split(digits, pal.by_fraction(0.1, seed=7), seed=4)
    assert one.train.ids == two.train.ids and one.test.ids == two.test.ids
    assert pal.split(digits, pal.by_fraction(0.1), seed=5).test.ids != one.test.ids


def test_named_ids_stay_in_the_training_data_and_are_all_forgotten(digits):
    named = digits.ids[::9]
    parts = pal.split(digits, pal.by_ids(named), test=0.3, holdout=0.3)
    assert sorted(parts.forget.ids) == sorted(named)


def test_named_ids_of_the_training_data_leave_test_and_holdout_as_they_are(digits):
    other = pal.split(digits, pal.by_fraction(0.1), seed=3)
    named = pal.split(digits, pal.by_ids(other.train.ids[::7]), seed=3)
    assert named.test.ids == other.test.ids and named.holdout.ids == other.holdout.ids
    assert sorted(named.train.ids) == sorted(other.train.ids)


def test_records_of_the_same_label_take_the_places_of_named_ones_in_test_and_holdout(digits):
    other = pal.split(digits, pal.by_fraction(0.1), seed=3)
    named = other.test.ids[:40] + other.holdout.ids[:40]
    parts = pal.split(digits, pal.by_ids(named), seed=3)
    assert sorted(parts.forget.ids) == sorted(named)
    for part, before in ((parts.test, other.test), (parts.holdout, other.holdout)):
        assert np.bincount(part.column("label")).tolist() == np.bincount(before.column("label")).tolist()
    assert set(other.test.ids) - set(named) <= set(parts.test.ids)


def test_records_of_other_labels_take_their_places_where_none_of_their_own_is_left():
    records = records_of([0] * 6 + [1] * 14)
    parts = pal.split(records, pal.by_ids([str(i) for i in range(6)]), test=0.3, holdout=0.2)
    assert len(parts.forget) == 6 and (len(parts.test), len(parts.holdout)) == (6, 4)
    assert set(parts.test.column("label")) == {1}


def test_too_many_named_ids_leave_no_records_to_draw():
    with pytest.raises(InvalidSplit, match="only 2 are free"):
        pal.split(records_of([0, 1] * 10), pal.by_ids([str(i) for i in range(18)]), test=0.3, holdout=0.0)


def test_rules_compose():
    records = records_of([0, 0, 0, 0, 1, 1, 1, 1], subject=list("abababab"))
    label, subject = pal.by_column("label", 1), pal.by_column("subject", "a")
    expect = {
        "and": (label & subject, [4, 6]),
        "or": (label | subject, [0, 2, 4, 5, 6, 7]),
        "not": (~label, [0, 1, 2, 3]),
        "nested": (~(label | subject) | pal.by_ids(["4"]), [1, 3, 4]),
    }
    for rule, wanted in expect.values():
        assert np.flatnonzero(rule.mask(records)).tolist() == wanted


def test_part_of_a_class_is_a_class_and_a_fraction(digits):
    parts = pal.split(digits, pal.by_column("label", 3) & pal.by_fraction(0.5, seed=1))
    whole = (parts.train.column("label") == 3).sum()
    assert set(parts.forget.column("label")) == {3} and 0.3 * whole < len(parts.forget) < 0.7 * whole
    assert parts.forgotten_labels == []


def test_classes_forgotten_as_a_whole_are_recognised_from_the_data(class_request):
    assert class_request.forgotten_labels == [3]
    assert (
        class_request.like_forgotten(class_request.test) == (class_request.test.column("label") == 3)
    ).all()


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        (pal.by_ids(["7", "nobody"]), UnknownIds, "'nobody'"),
        (pal.by_column("label", 9), AbsentClass, "label = 9"),
        (pal.by_column("lable", 1), UnknownName, "Did you mean 'label'"),
        (pal.by_column("label", 0) & pal.by_column("label", 1), EmptyForgetSet, "matches no training record"),
        (pal.by_column("label", 0, 1), ForgetCoversEverything, "nothing is left"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_with_the_reason(rule, error, words):
    with pytest.raises(error, match=words):
        pal.split(records_of([0, 1] * 10), rule)


@pytest.mark.parametrize("shares", [(0.6, 0.4), (-0.1, 0.2), (1.0, 0.0)])
def test_shares_that_leave_no_training_data_are_refused(shares):
    with pytest.raises(InvalidSplit):
        pal.split(records_of([0, 1] * 10), pal.by_column("label", 1), test=shares[0], holdout=shares[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
    with pytest.raises(InvalidSplit):
        pal.by_fraction(fraction)


def test_own_test_records_and_rules_for_them_are_taken_as_given():
    records = records_of([0, 1] * 10, fold=["train"] * 12 + ["test"] * 4 + ["control"] * 4)
    parts = pal.split(
        records,
        pal.by_column("label", 1),
        test=pal.by_column("fold", "test"),
        holdout=pal.by_column("fold", "control"),
    )
    assert parts.test.ids == ["12", "13", "14", "15"] and parts.holdout.ids == ["16", "17", "18", "19"]
    own = records.select([0, 1])
    assert pal.split(records, pal.by_column("label", 1), test=own, holdout=0.0).test is own


def test_parts_that_share_a_record_are_refused():
    records = records_of([0, 1] * 4)
    with pytest.raises(InvalidSplit, match="'1' is in both forget and test"):
        pal.ForgetSplit(
            forget=records.select([0, 1]), retain=records.select([2, 3]), test=records.select([1])
        )


def test_a_number_given_as_text_matches_a_numeric_column():
    parts = pal.split(records_of([0, 1] * 10), pal.by_column("label", "1"), test=0.0, holdout=0.0)
    assert set(parts.forget.column("label")) == {1}
