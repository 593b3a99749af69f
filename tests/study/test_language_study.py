"""Studies of language models: requests in turn over questions, and which measures deserve trust."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.report import AuditReport
from palimpsest.audit.verdict import Verdict
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.finding import Finding
from palimpsest.core.scale import judged
from palimpsest.core.selection import by_column
from palimpsest.core.split import at_the_end, in_turn, split
from palimpsest.data import load_data
from palimpsest.report.inside import answers_chart
from palimpsest.report.turns import turns_chart
from palimpsest.study.compare import compare
from palimpsest.study.metric_check import faithful, robust
from palimpsest.study.result import CellResult, StudyResult
from palimpsest.study.turns import matrix, turns_of


def hit(value: float, original: float = 1.0, controls: tuple[float, ...] = (0.0, 0.02)) -> Finding:
    plain = Finding(
        "recall",
        "forget_hit",
        value,
        more_is="knowledge",
        original=original,
        controls=controls,
        bears="outputs",
    )
    return judged(plain, prior=0.02)


def cell(request: str, step: int, review: bool, forget: float, test: float, seed: int = 0) -> CellResult:
    findings = (hit(forget), Finding("recall", "test_hit", test, more_is="utility"))
    facts = {"request": request, "step": step, "review": review, "label": "m", "method": "m", "seed": seed}
    report = AuditReport(Verdict.INCOMPLETE, (), findings, facts=facts)
    seeds = {"training": seed, "unlearning": seed, "auditing": seed}
    return CellResult(f"{request}{step}{review}{seed}", "m", "m", request, seeds, "done", report=report)


@pytest.fixture
def finished(tmp_path):
    cells = [
        cell("fold = 0", 0, False, 0.1, 0.8),
        cell("fold = 1", 1, False, 0.2, 0.7),
        cell("fold = 2", 2, False, 0.2, 0.6),
        cell("fold = 0, at the end", 0, True, 0.4, 0.6),
        cell("fold = 1, at the end", 1, True, 0.2, 0.6),
    ]
    return StudyResult("turns", tmp_path, tuple(cells))


def test_questions_stand_for_accuracy_where_there_are_no_classes(finished):
    (item,) = turns_of(finished)
    assert item.steps == 3
    assert item.figures["test first"][0] == 0.8 and item.figures["test last"][0] == 0.6
    assert item.figures["test slope"][0] == pytest.approx(-0.1)
    control = 0.01
    k = [(value - control) / (1 - control) for value in (0.1, 0.2, 0.2)]
    assert item.figures["K in time"][0] == pytest.approx(np.mean(k))
    assert item.figures["re-emergence"][0] == pytest.approx((0.4 - 0.1) / (1 - control))
    assert turns_chart(finished.reports) is not None


def test_requests_for_folds_of_people_follow_each_other():
    records = load_data("people", people=6, folds=3, relations="city,phone", general=4, countries=1)
    turns = in_turn([split(records, by_column("fold", fold)) for fold in (0, 1, 2)])
    seen: set[str] = set()
    for fold, turn in enumerate(turns):
        assert set(turn.forget.column("fold")) == {fold}
        assert not seen & set(turn.retain.ids)
        seen |= set(turn.forget.ids)
    reviews = at_the_end(turns)
    assert [review.description for review in reviews] == ["fold = 0, at the end", "fold = 1, at the end"]
    assert reviews[0].retain.ids == turns[-1].retain.ids


def report(seed: int, *findings: Finding) -> AuditReport:
    return AuditReport(Verdict.INCOMPLETE, (), findings, facts={"seed": seed, "request": "fold = 0"})


def test_a_measure_is_faithful_if_originals_lie_above_controls_over_the_seeds():
    def silent(original: float, control: float) -> Finding:
        return Finding("recall", "noise", 0.0, more_is="knowledge", original=original, controls=(control,))

    reports = [
        report(0, hit(0.5, 1.0, (0.0,)), silent(0.3, 0.4)),
        report(1, hit(0.5, 0.9, (0.1,)), silent(0.6, 0.5)),
        report(1, hit(0.1, 0.9, (0.1,)), silent(0.6, 0.5)),  # another method beside the same models
    ]
    first, second = faithful(reports)
    assert (first.finding, first.faithfulness) == ("recall.forget_hit", 1.0)
    assert (first.informed, first.ignorant) == (2, 2)
    assert second.faithfulness == pytest.approx(0.5)  # of 4 pairs two are in order


def test_one_seed_is_too_few_for_faithfulness():
    with pytest.raises(InvalidAudit, match="several seeds"):
        faithful([report(0, hit(0.5))])


def test_robustness_is_read_off_the_attacks():
    def attack(audit: str, name: str, value: float, control: float) -> Finding:
        return Finding(audit, name, value, more_is="knowledge", original=1.0, controls=(control,))

    attacked = report(
        0,
        hit(0.2),
        attack("relearning", "levelled", 0.2, 0.0),
        attack("relearning", "final", 0.8, 0.3),
        attack("quantization", "forget_4bit", 0.4, 0.0),
    )
    found = robust(attacked)
    assert found["relearning"] == pytest.approx(0.3 / 0.6) and found["quantization"] == pytest.approx(0.5)
    assert found["both"] == pytest.approx(0.5)
    with pytest.raises(InvalidAudit, match="run the audit 'quantization'"):
        robust(report(0, hit(0.2), *attacked.findings[1:3]))


def test_what_is_readable_inside_is_drawn_block_by_block():
    def rows(value: float, role: str) -> list[dict[str, object]]:
        shared = {"model": role, "block": 0, "k": None}
        lens = {**shared, "head": "own", "probability": value}
        return [lens, {**shared, "probe": "any value", "accuracy": value / 2}]

    both = [rows(0.8, "original"), rows(0.1, "unlearned"), rows(0.0, "control 0")]
    drawn = answers_chart([
        AuditReport(
            Verdict.INCOMPLETE, (), (),
            {"lens": tuple(pair[0] for pair in both), "probes": tuple(pair[1] for pair in both)},
            {"seed": 0, "request": "fold = 0", "label": "m", "method": "m"},
        )
    ])  # fmt: skip
    assert drawn is not None
    rows_drawn = [row for table in drawn["datasets"].values() for row in table if "read" in row]
    values = {(row["label"], row["read"]): row["mean"] for row in rows_drawn}
    assert values == {
        (label, read): pytest.approx(value / part)
        for label, value in (("original", 0.8), ("m", 0.1), ("retrained", 0.0))
        for read, part in (("by the head own", 1), ("by a probe, any value", 2))
    }
    assert answers_chart([report(0, hit(0.5))]) is None


@pytest.mark.slow
def test_a_study_forgets_fold_after_fold_of_people(tmp_path):
    """From recipe to matrix, on a model too small to learn anything: only the course of things is looked at."""
    recipe = {
        "name": "folds in turn",
        "data": {
            "name": "people",
            "settings": {
                "people": 6, "folds": 3, "relations": ["city"], "general": 4, "countries": 1, "forms": ["qa"],
            },
        },
        "model": {"name": "small_llama", "settings": {"width": 16, "layers": 1, "heads": 2}},
        "task": {"name": "language", "settings": {"vocabulary": 400}},
        "training": {"epochs": 1, "lr": 1e-3, "batch_size": 32, "optimizer": "adamw"},
        "forget": ["fold=0", "fold=1"],
        "in_turn": True,
        "methods": [{"name": "grad-ascent", "settings": {"epochs": 1, "max_steps": 1, "lr": 1e-3}}],
        "audits": ["recall", {"name": "later-learning", "settings": {"steps": 2, "every": 1}}, "trace"],
        "controls": 1,
        "threads": 1,
        "device": "cpu",
    }  # fmt: skip
    done = compare(recipe, tmp_path / "run", progress=False)
    assert not done.failed
    requests = {cell.request: cell for cell in done.select("grad-ascent")}
    assert set(requests) == {"fold = 0", "fold = 1", "fold = 0, at the end"}

    def weights(cell: CellResult, role: str) -> str:
        rows = cell.report.series["trace"]
        return next(row["value"] for row in rows if (row["what"], row["name"]) == ("sha256 of weights", role))

    first, second, again = (requests[name] for name in ("fold = 0", "fold = 1", "fold = 0, at the end"))
    assert weights(second, "unlearned") == weights(again, "unlearned") != weights(first, "unlearned")
    assert matrix(list(requests.values()), "recall.test_hit", scaled=False).scores.shape == (2, 2)
    assert [item.steps for item in turns_of(done) if item.label.startswith("grad-ascent")] == [2]
