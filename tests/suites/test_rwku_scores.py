"""Scores of RWKU: groups of probes, kinds, neighbours, what was known before."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.core.errors import InvalidAudit, InvalidRecords, UnknownName
from palimpsest.suites import rwku_scores as rwku
from palimpsest.suites.rwku_scores import Probe

HIT, MISS = "Maine", "no"


def probe(subject: str, level: str, hit: bool, kind: str = "") -> Probe:
    return Probe(subject, level, kind, "Maine", HIT if hit else MISS)


@pytest.fixture
def probes() -> list[Probe]:
    return [
        probe("King", "1", True),
        probe("King", "1", False),
        probe("King", "2", True),
        probe("King", "3", True, "cross lingal"),
        probe("King", "3", True, "reverse query"),
        probe("Rowling", "1", False),
        probe("Rowling", "3", False, "cross lingual"),
    ]


def test_all_pools_over_probes_and_the_mean_over_targets_stands_beside_it(probes: list[Probe]):
    found = rwku.recall(probes)
    assert found.all.pooled == pytest.approx(100 * 4 / 7)
    assert found.all.by_subject == pytest.approx(100 * (4 / 5 + 0) / 2)
    assert (found.all.n, found.all.subjects) == (7, 2)
    assert found.levels["fill-in-blank"].pooled == pytest.approx(100 / 3)
    assert found.levels["question"].pooled == 100
    assert found.kinds["cross lingual"].pooled == 50  # both spellings are one kind
    assert "prefix injection" not in found.kinds
    assert found.subjects["Rowling"].pooled == 0


def test_targets_can_be_chosen_and_must_be_there(probes: list[Probe]):
    assert rwku.recall(probes, ["Rowling"]).all.n == 2
    with pytest.raises(InvalidRecords, match="'Bach'"):
        rwku.recall(probes, ["King", "Bach"])
    with pytest.raises(InvalidRecords, match="no probe"):
        rwku.recall([])


def test_an_empty_level_is_refused_where_all_are_required(probes: list[Probe]):
    rwku.required_levels(rwku.recall(probes))
    with pytest.raises(InvalidRecords, match="adversarial"):
        rwku.required_levels(rwku.recall([p for p in probes if p.level != "3"]))


def test_kinds_have_one_name_in_every_published_spelling():
    assert [rwku.probe_kind(name) for name in rwku.KINDS] == list(rwku.KINDS)
    assert rwku.probe_kind("incontext learning") == rwku.probe_kind("in-context_learning")
    assert rwku.probe_kind("context hint") == "background hint"
    with pytest.raises(UnknownName, match="prefix injection"):
        rwku.probe_kind("prefix injektion")
    with pytest.raises(UnknownName, match="probe level"):
        probe("King", "4", True)
    with pytest.raises(UnknownName, match="kind of probe"):
        probe("King", "3", True)
    with pytest.raises(InvalidRecords, match="blank answer"):
        Probe("King", "1", "", "  ", "x")


def test_scores_are_compared_with_before_and_only_what_was_known_is_asked(probes: list[Probe]):
    before = rwku.recall(probes)
    after = rwku.recall([probe(p.subject, p.level, False, p.kind) for p in probes])
    assert rwku.kept(before, after) == {"all": 0, "fill-in-blank": 0, "question": 0, "adversarial": 0}
    assert rwku.kept(before, before)["question"] == 1
    assert rwku.known_before(probes) == [0, 2, 3, 4]
    with pytest.raises(InvalidAudit, match="answers no probe of all"):
        rwku.kept(after, before)
    with pytest.raises(InvalidAudit, match="none of 1"):
        rwku.known_before(probes[1:2])


def test_a_probe_may_not_hold_its_answer_unless_it_is_a_choice():
    rwku.check_leakage("Where was the author of Misery born?", ["Maine", "Portland"])
    with pytest.raises(InvalidRecords, match="'Portland'"):
        rwku.check_leakage("Born in portland, he ...", ["Maine", "Portland"])
    rwku.check_leakage("(a) Maine (b) Ohio?", ["Maine"], "multiple choice")


def test_a_neighbour_probe_may_not_ask_for_the_target():
    rwku.check_neighbour("Stephen King", ["Tabitha King"])
    with pytest.raises(InvalidRecords, match="Stephen King"):
        rwku.check_neighbour("Stephen King", ["stephen king."])


def test_the_chance_of_a_choice():
    assert rwku.chance(["a", "b", "c", "d"], "b") == 0.25
    for choices in (["b"], ["a", "c"], ["b", "b"]):
        with pytest.raises(InvalidRecords, match="different choices"):
            rwku.chance(choices, "b")


def test_groups_agree_with_a_plain_mean_over_many_probes():
    random = np.random.default_rng(0)
    many = [
        probe(f"p{random.integers(5)}", str(random.integers(1, 3)), bool(random.integers(2)))
        for _ in range(60)
    ]
    found = rwku.recall(many)
    hits = {level: [p.prediction == HIT for p in many if p.level == level] for level in ("1", "2")}
    assert found.levels["fill-in-blank"].pooled == pytest.approx(100 * np.mean(hits["1"]))
    assert found.levels["question"].pooled == pytest.approx(100 * np.mean(hits["2"]))
    own = [np.mean([p.prediction == HIT for p in many if p.subject == s]) for s in {p.subject for p in many}]
    assert found.all.by_subject == pytest.approx(100 * np.mean(own))
