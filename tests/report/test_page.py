"""The page: complete, self-contained, safe with any name."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import altair as alt
import pytest

from palimpsest.core.errors import CannotWrite, InvalidAudit
from palimpsest.report import html_report, write_report
from palimpsest.report.page import PANELS
from tests.report.panels import ELSEWHERE


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def test_every_panel_is_drawn_and_is_valid_vega_lite(study, page):
    charts = data_of(page.read_text())["charts"]
    assert list(charts) == [panel.key for panel in PANELS if panel.key not in ELSEWHERE]
    for spec in charts.values():
        assert spec["datasets"]["rows"]
        alt.Chart.from_dict(spec)  # raises if the specification breaks the schema


def test_every_request_and_model_is_shown_with_its_verdicts(study, page):
    text = page.read_text()
    for request in ("label = 3", "a random 0.1 of the records (seed 0)"):
        assert f'data-request="{request}"' in text
    for label in ("original", "retrained", "ssd", "finetune (epochs=1)"):
        assert f'data-label="{label}"' in text
    for verdict in {report.verdict.value for report in study.reports}:
        assert f'<span class="badge {verdict}">' in text


def test_findings_are_means_over_seeds_of_what_was_measured(study, page):
    rows = {(r["request"], r["label"], r["finding"]): r for r in data_of(page.read_text())["findings"]}
    for request in ("label = 3", "a random 0.1 of the records (seed 0)"):
        values = [cell.value("utility.test_accuracy") for cell in study.select("ssd", request)]
        shown = rows[request, "ssd", "utility.test_accuracy"]
        assert shown["value"][0] == pytest.approx(sum(values) / len(values), abs=6e-4)
        assert shown["value"][1] <= shown["value"][0] <= shown["value"][2]


def test_nothing_is_loaded_from_anywhere(page):
    text = page.read_text()
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "http" not in markup and "src=" not in markup
    assert "@import" not in text and re.search(r"<script[^>]+src", text) is None


def test_names_cannot_break_out_of_the_page(study):
    evil = '</script><script>alert("x")</script>'
    report = study.reports[0]
    named = replace(report, facts={**report.facts, "label": evil, "request": evil, "method": "own"})
    text = html_report([named], evil)
    assert evil not in text
    assert data_of(text)["requests"] == [evil]


def test_failures_are_listed_as_text(page):
    assert "it &lt;b&gt;diverged&lt;/b&gt;" in page.read_text()


def test_audits_that_were_not_run_are_said_not_to_have_passed(page):
    text = page.read_text()
    assert "that is not the same as passed" in text and "<code>probe.audit</code> not asked for" in text


def test_a_single_audit_knows_original_and_retrained_from_its_own_evidence(study):
    only = [report for report in study.reports if report.facts["label"] == "ssd"][:1]
    charts = data_of(html_report(only))["charts"]
    for key in ("trade-off", "roc", "cka", "relearning", "confidence"):
        labels = {row["label"] for row in charts[key]["datasets"]["rows"] if row.get("label")}
        assert labels == {"original", "retrained", "ssd"}, key


def test_a_report_saves_itself_as_a_page(study, tmp_path):
    place = study.reports[0].save(tmp_path / "one.html")
    assert "<!doctype html>" in place.read_text()


def test_no_report_and_no_place_are_told(study, tmp_path):
    with pytest.raises(InvalidAudit):
        html_report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite):
        write_report(study.reports, tmp_path / "file" / "report.html")
