from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.audit import examine
from palimpsest.audit.interclass import InterclassConfusion, confusions
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.models import build_model

A, B = 3, 8


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_confusions_are_what_counting_one_by_one_gives(pairs):
    predicted, labels = (np.array(side) for side in zip(*pairs, strict=True))
    wrong = sum(label in (1, 2) and guess != label for guess, label in pairs)
    mixed = sum((label, guess) in ((1, 2), (2, 1)) for guess, label in pairs)
    assert confusions(predicted, labels, 1, 2) == (wrong, mixed)


@pytest.fixture(scope="module")
def evidence(digits, digits_task):
    """Half of the training records of two classes carry the other's label; they are to be forgotten."""
    plain = pal.split(digits, pal.by_column("label", A, B) & pal.by_fraction(0.5, seed=0), seed=0)
    labels = digits.tensors["label"].clone()
    confused = torch.from_numpy(plain.forget.positions)
    labels[confused] = A + B - labels[confused]
    records = pal.Records(TensorDataset(digits.tensors["input"], labels), ids=digits.ids)
    parts = pal.ForgetSplit(**{name: records.select(part.positions) for name, part in plain.parts.items()})
    model = pal.train(
        build_model("small_cnn", (1, 8, 8), 10, seed=0), parts.train, digits_task, epochs=40, seed=0
    )
    retrained = [pal.forget(model, parts, "retrain", digits_task, seed=1 + k) for k in range(6)]
    return Evidence(model, parts, digits_task, pal.Runtime(threads=1), model, retrained[:3]), retrained[3:]


def test_a_retrained_model_mixes_nothing_up_and_the_untouched_one_does(evidence):
    shared, retrained = evidence
    audit = InterclassConfusion((A, B))
    untouched = examine(shared, [audit])
    for model in retrained:
        gone = examine(shared.judging(model), [audit])
        for name in ("ic_err", "fgt_err"):
            before, after = (report.finding(f"interclass-confusion.{name}") for report in (untouched, gone))
            assert before.valid and before.k == pytest.approx(1) and before.low <= before.value <= before.high
            assert after.value < before.value / 2 and after.k_low <= 0 <= after.k_high


def test_a_method_that_does_nothing_is_caught(evidence, digits_task):
    shared, _ = evidence
    lazy = pal.forget(shared.original, shared.split, "finetune", digits_task, epochs=1, lr=1e-5)
    report = examine(shared.judging(lazy), [InterclassConfusion((A, B))])
    assert report.finding("interclass-confusion.ic_err").judgement.value == "separated"


@pytest.mark.parametrize("classes", [(1, 1), (1,), (1, 2, 3)])
def test_two_different_classes_are_asked_for(classes):
    with pytest.raises(InvalidAudit, match="two different classes"):
        InterclassConfusion(classes)


def test_a_class_without_test_records_is_named(evidence):
    shared, _ = evidence
    with pytest.raises(InvalidAudit, match="none of class 12"):
        InterclassConfusion((A, 12)).run(shared)
