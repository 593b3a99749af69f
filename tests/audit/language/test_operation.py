"""Requests in turn (E1), growing ones (E2), the trace (E4), the check of measures (E5), with methods of known fate."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.audit.language.growing import GrowingRequests
from palimpsest.audit.language.metric_check import MetricCheck
from palimpsest.audit.language.repeated import request_for, subjects_apart
from palimpsest.audit.language.sequential import Sequential
from palimpsest.audit.trace_record import Trace, ids_digest, touched, weights_digest
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.needs import Need
from palimpsest.core.unlearner import Card
from tests.audit import planted_language as planted
from tests.audit.language.conftest import found


@dataclass(frozen=True)
class Scripted:
    """Gives back one model after the other, and notes what it was asked for."""

    models: tuple[nn.Module, ...]
    asked: list = field(default_factory=list)
    card = Card("scripted", "", frozenset({Need.MODEL}), ("language",), None)

    def unlearn(self, model, split, task, runtime):
        self.asked.append(split)
        return self.models[min(len(self.asked), len(self.models)) - 1]


@pytest.fixture
def with_method(language_evidence, tiny):
    def make(*models: nn.Module) -> tuple[Evidence, Scripted]:
        method = Scripted(models)
        return language_evidence.judging(tiny.original, method=method), method

    return make


def test_subjects_are_divided_with_all_their_records(language_evidence):
    parts = subjects_apart(language_evidence, (0.5, 1.0))
    people = [set(part.column("subject")) for part in parts]
    assert not people[0] & people[1] and len(people[0]) == len(people[1]) == 2
    assert sorted(one for part in parts for one in part.ids) == sorted(language_evidence.split.forget.ids)
    request = request_for(language_evidence, parts[0], "half")
    assert set(request.retain.ids) == set(language_evidence.split.retain.ids) | set(parts[1].ids)
    with pytest.raises(InvalidAudit, match="do not divide"):
        subjects_apart(language_evidence, [at / 10 for at in range(1, 11)])


def test_a_method_that_does_nothing_keeps_k_at_one_and_utility_flat(with_method, tiny):
    evidence, method = with_method(tiny.original)
    outcome = Sequential().run(evidence)
    assert found(outcome, "k_at_the_end").value == found(outcome, "k_at_once").value == pytest.approx(1.0)
    assert found(outcome, "re_emergence").value == pytest.approx(0.0)
    assert found(outcome, "utility_slope").value == pytest.approx(0.0, abs=1e-9)
    first, second = method.asked
    assert set(second.forget.ids) <= set(first.retain.ids)
    assert not set(first.forget.ids) & {one for part in second.parts.values() for one in part.ids}


def test_what_comes_back_with_the_second_request_is_called_re_emergence(with_method, tiny):
    evidence, _ = with_method(tiny.controls[0], tiny.original)
    outcome = Sequential().run(evidence)
    assert found(outcome, "re_emergence").value == pytest.approx(1.0)
    assert found(outcome, "k_in_time").value == pytest.approx(0.5)
    rows = outcome.series["sequential"]
    assert [row["k"] for row in rows if row["step"] == 1] == pytest.approx([0.0, 0.0])
    assert [row["k"] for row in rows if row["step"] == 2] == pytest.approx([1.0, 1.0])


def test_utility_lost_with_every_request_gives_its_slope(with_method, tiny):
    wreck = planted.noisy(tiny.original, 0.5)
    evidence, _ = with_method(tiny.original, wreck)
    outcome = Sequential().run(evidence)
    start, end = (
        row["retain_accuracy"] for row in (outcome.series["sequential"][0], outcome.series["sequential"][-1])
    )
    assert end < 0.2 < start
    assert found(outcome, "utility_slope").value == pytest.approx((end - start) / 2)


def test_every_share_is_asked_for_from_the_original(with_method, tiny):
    evidence, method = with_method(tiny.controls[0], tiny.original)
    outcome = GrowingRequests(shares=(0.5, 1.0)).run(evidence)
    assert found(outcome, "k_50").value == pytest.approx(0.0)
    assert found(outcome, "k_100").value == pytest.approx(1.0)
    half, whole = method.asked
    assert set(half.forget.ids) < set(whole.forget.ids) == set(evidence.split.forget.ids)
    rows = outcome.series["growing"]
    assert [row["records"] for row in rows] == [len(half.forget), len(whole.forget)]
    assert rows[1]["share_of_training"] == pytest.approx(len(whole.forget) / len(evidence.split.train))


@pytest.mark.parametrize("audit", [Sequential(), GrowingRequests()], ids=["in turn", "growing"])
def test_without_the_method_nothing_can_be_repeated(language_evidence, audit):
    finding = audit.run(language_evidence).findings[0]
    assert finding.judgement == Judgement.NOT_RUN and "cannot be repeated" in finding.note
    assert not audit.card.default


@pytest.mark.parametrize("shares", [(), (0.5, 0.25), (0.0, 1.0), (0.5, 1.5)])
def test_shares_must_rise(shares):
    with pytest.raises(InvalidHyperparameter):
        GrowingRequests(shares=shares)


def test_a_digest_of_weights_tells_one_changed_number(tiny):
    changed = copy.deepcopy(tiny.original)
    assert weights_digest(changed) == weights_digest(tiny.original)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    assert weights_digest(changed) != weights_digest(tiny.original)
    assert touched(tiny.original, changed) == ["model.layers.1.mlp.down_proj.weight"]
    assert weights_digest(changed.bfloat16()) != weights_digest(tiny.original)


def test_a_wrapper_touches_nothing_and_the_order_of_ids_does_not_count(tiny):
    around = planted.refusing(tiny.original, tiny.task, tiny.split.forget)
    assert touched(tiny.original, around) == []
    assert ids_digest(["b", "a"]) == ids_digest(["a", "b"]) != ids_digest(["a", "c"])


def test_removal_without_a_touched_parameter_is_said(with_method, tiny):
    evidence, _ = with_method(tiny.original)
    outcome = Trace().run(evidence)
    assert "no parameter was touched" in found(outcome, "tensors_touched").note
    record = {(row["what"], row["name"]): row["value"] for row in outcome.series["trace"]}
    assert record["sha256 of weights", "unlearned"] == record["sha256 of weights", "original"]
    assert record["sha256 of weights", "control 0"] != record["sha256 of weights", "original"]
    assert record["records", "forget"] == len(tiny.split.forget)
    assert record["intention", ""] == "removal" and record["method", ""] == "scripted"
    moved = Trace().run(evidence.judging(tiny.controls[0]))
    assert found(moved, "tensors_touched").value == 1.0
    assert "no parameter" not in found(moved, "tensors_touched").note


def test_measures_that_tell_knowledge_have_an_auc_of_one(language_evidence):
    outcome = MetricCheck().run(language_evidence)
    assert found(outcome, "hit").value == 1.0
    for finding in outcome.findings:
        assert finding.value is not None and finding.value > 0.9


def test_measures_on_equal_models_say_nothing(tiny, language_evidence):
    alike = Evidence(
        tiny.original, tiny.split, tiny.task, language_evidence.runtime, tiny.original, [tiny.original]
    )
    for finding in MetricCheck().run(alike).findings:
        assert finding.value == pytest.approx(0.5)
    assert np.all(
        [0 <= row["low"] <= row["high"] <= 1 for row in MetricCheck().run(alike).series["measures"]]
    )
