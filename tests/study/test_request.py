from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidRecipe, InvalidSplit, UnknownIds
from palimpsest.core.records import Records
from palimpsest.study.request import Request, parse_request


@pytest.fixture(scope="module")
def records() -> Records:
    labels = torch.arange(40) % 5
    return Records(
        TensorDataset(torch.zeros(40, 1), labels),
        ids=[f"r{index}" for index in range(40)],
        columns={"subject": [f"p{index % 8}" for index in range(40)]},
    )


def chosen(request: Request, records: Records) -> list[bool]:
    rule = request.selection()
    rule.check(records)
    return rule.mask(records).tolist()


def test_short_forms_pick_what_they_say(records):
    labels, subjects = records.column("label"), records.column("subject")
    expected = {
        "label=3": labels == 3,
        "label=3,4": (labels == 3) | (labels == 4),
        "subject=p1": subjects == "p1",
        "ids=r0,r7": np.isin(records.ids, ["r0", "r7"]),
        "label=3 & subject=p3": (labels == 3) & (subjects == "p3"),
        "label=3 | subject=p3&label=1": (labels == 3) | ((subjects == "p3") & (labels == 1)),
        "not label=3": labels != 3,
    }
    for text, mask in expected.items():
        assert chosen(parse_request(text), records) == mask.tolist(), text


def test_a_fraction_takes_its_share_and_its_seed_from_the_short_form(records):
    first, again, other = (
        chosen(parse_request(text), records)
        for text in ("fraction=0.25", "fraction=0.25@0", "fraction=0.25@7")
    )
    assert sum(first) == sum(other) == 10
    assert first == again != other


def test_a_file_of_ids_is_a_request_under_its_own_name(records, tmp_path):
    for content in (["r1", "r2"], {"ids": ["r1", "r2"], "why": "worst case"}):
        (tmp_path / "worst.json").write_text(json.dumps(content))
        request = parse_request(str(tmp_path / "worst.json"))
        assert [records.ids[i] for i in np.flatnonzero(chosen(request, records))] == ["r1", "r2"]
        assert request.selection().description == "worst.json"


leaves = st.one_of(
    st.integers(0, 4).map(lambda label: ({"label": label}, lambda row: row["label"] == label)),
    st.sampled_from(["p0", "p3", "p7"]).map(
        lambda name: ({"column": "subject", "values": [name]}, lambda row: row["subject"] == name)
    ),
    st.lists(st.sampled_from(["r1", "r9", "r33"]), min_size=1).map(
        lambda ids: ({"ids": ids}, lambda row: row["id"] in ids)
    ),
)


def combined(children):
    lists = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        lists.map(lambda parts: ({"all": [p[0] for p in parts]}, lambda row: all(p[1](row) for p in parts))),
        lists.map(lambda parts: ({"any": [p[0] for p in parts]}, lambda row: any(p[1](row) for p in parts))),
        children.map(lambda part: ({"not": part[0]}, lambda row: not part[1](row))),
    )


@given(st.recursive(leaves, combined, max_leaves=6))
def test_any_combination_picks_what_its_logic_says_and_survives_being_written(records, pair):
    fields, truth = pair
    request = Request.model_validate(fields)
    rows = [
        {"id": i, "label": label, "subject": subject}
        for i, label, subject in zip(
            records.ids, records.column("label"), records.column("subject"), strict=True
        )
    ]
    assert chosen(request, records) == [bool(truth(row)) for row in rows]
    assert (
        Request.model_validate(json.loads(json.dumps(request.model_dump(mode="json", by_alias=True))))
        == request
    )


@pytest.mark.parametrize(
    "text", ["", "label", "label=", "=3", "fraction=much", "fraction=0.1@x", "not ", "a.yaml"]
)
def test_a_short_form_that_cannot_be_read_is_refused_with_examples(text):
    with pytest.raises(InvalidRecipe, match="request"):
        parse_request(text)


@pytest.mark.parametrize(
    "fields",
    [{}, {"label": 3, "fraction": 0.1}, {"column": "subject"}, {"values": ["p1"]}, {"lable": 3}, {"seed": 3}],
)
def test_a_request_names_exactly_one_thing(fields):
    with pytest.raises(ValueError, match=r"exactly one|go together|Extra inputs"):
        Request.model_validate(fields)


def test_files_that_hold_no_ids_are_refused_by_name(records, tmp_path):
    for name, content in (("absent.json", None), ("broken.json", "[1,"), ("other.json", '{"records": []}')):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InvalidSplit, match=name):
            parse_request(str(tmp_path / name)).selection()


def test_unknown_ids_are_found_when_the_request_meets_the_data(records):
    with pytest.raises(UnknownIds, match="r99"):
        chosen(parse_request("ids=r1,r99"), records)
