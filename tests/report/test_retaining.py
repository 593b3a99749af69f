from __future__ import annotations

import json
import re

import pytest

from palimpsest.core.errors import InvalidAudit
from palimpsest.report.retaining import (
    PANELS,
    curves_chart,
    gradients_chart,
    matrix_chart,
    retain_html,
    write_retain_report,
)
from palimpsest.retain.metrics import accuracy_interval
from palimpsest.study.retain import RetainResult, retain

RECIPE = {
    "streams": ["class:3x2", "domain:permuted:2"],
    "methods": ["finetune", {"name": "er", "settings": {"memory": 40}, "label": "</script>er"}],
    "model": {"name": "mlp", "settings": {"width": 16}},
    "training": {"epochs": 1, "batch_size": 64},
    "every": 3,
    "subset": 20,
    "seeds": 2,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return retain(RECIPE, tmp_path_factory.mktemp("run"), progress=False)


def rows_of(chart):
    return chart["datasets"]["rows"]


def test_the_heat_map_shows_the_mean_of_the_matrices(result):
    rows = {
        (row["request"], row["label"], row["step"], row["task"]): row["mean"]
        for row in rows_of(matrix_chart(result))
    }
    cells = [cell for cell in result.cells if cell.stream == "class:3x2" and cell.label == "finetune"]
    for step in range(3):
        for task in range(step + 1):
            expected = sum(cell.outcome["matrix"][step][task] for cell in cells) / 2
            assert rows["class:3x2", "finetune", step + 1, task + 1] == pytest.approx(expected, rel=1e-5)
    assert ("class:3x2", "finetune", 1, 2) not in rows and ("domain:permuted:2", "finetune", 1, 2) in rows


def test_curves_keep_the_lowest_point_of_each_stretch(result):
    rows = [
        row
        for row in rows_of(curves_chart(result))
        if row["shown"] == "task 1" and row["label"] == "finetune"
    ]
    lowest = min(row["mean"] for row in rows if row["request"] == "class:3x2")
    cells = [cell for cell in result.cells if cell.stream == "class:3x2" and cell.label == "finetune"]
    assert lowest == pytest.approx(
        min(
            sum(values) / 2
            for values in zip(
                *([row[0] for row in cell.outcome["history"]["accuracy"]] for cell in cells), strict=True
            )
        ),
        rel=1e-5,
    )


def test_curves_have_bands_as_wide_as_the_records_that_were_drawn_allow(result):
    rows = [row for row in rows_of(curves_chart(result)) if row["shown"] == "task 1"]
    for row in rows:
        low, high = accuracy_interval(row["mean"], 2 * 20)
        assert row["low"] <= low + 1e-4 and row["high"] >= high - 1e-4 and row["low"] < row["high"]


def test_norms_of_the_gradients_are_drawn_where_they_were_noted(result, tmp_path):
    assert gradients_chart(result) is None
    told = retain({**RECIPE, "gradients": True, "seeds": 1}, tmp_path, progress=False)
    cell = next(cell for cell in told.cells if cell.label != "finetune" and cell.stream == "class:3x2")
    rows = [row for row in rows_of(gradients_chart(told)) if row["request"] == "class:3x2"]
    assert {row["part"] for row in rows} == {"plasticity", "stability"}
    assert {row["label"] for row in rows} == {cell.label}, "finetune holds on to nothing"
    largest = max(row["mean"] for row in rows if row["part"] == "plasticity")
    assert largest <= max(cell.outcome["gradients"]["plasticity"]) + 1e-6
    plain = next(
        c for c in result.cells if (c.label, c.stream, c.seed) == (cell.label, cell.stream, cell.seed)
    )
    assert cell.outcome["matrix"] == plain.outcome["matrix"] and cell.key != plain.key


def test_min_acc_carries_an_interval_in_the_json_and_in_the_table(result):
    stored = result.to_dict()
    for row in stored["summary"]:
        low, high = row["sampling"]["min-ACC"]
        assert low <= row["min-ACC"]["mean"] <= high and "WC-ACC" in row["sampling"]
        assert f"[{100 * low:.0f}, {100 * high:.0f}]" in retain_html(result)
    assert all(cell["sampling"]["min-ACC"][0] < cell["sampling"]["min-ACC"][1] for cell in stored["cells"])


def test_the_page_holds_every_chart_and_no_name_can_end_a_script(result, tmp_path):
    page = write_retain_report(result, tmp_path / "report.html").read_text()
    data = json.loads(
        re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1].replace("<\\/", "</")
    )
    assert set(data["charts"]) == {panel.key for panel in PANELS} - {"gradients"}  # which were not noted
    assert data["requests"] == ["class:3x2", "domain:permuted:2"]
    assert "</script>er" not in page
    assert "http://" not in re.sub(
        r"https?://(www\.w3\.org|vega\.github\.io)\S*", "", data["charts"]["cost"]["$schema"]
    )


def test_without_evaluation_while_learning_there_is_no_curve(tmp_path):
    plain = {**RECIPE, "every": 0, "streams": ["class:3x2"], "methods": ["finetune"], "seeds": 1}
    done = retain(plain, tmp_path, progress=False)
    assert curves_chart(done) is None
    assert 'id="chart-curves"' not in retain_html(done)


def test_a_study_without_a_finished_cell_has_no_page(tmp_path):
    with pytest.raises(InvalidAudit, match="nothing to show"):
        retain_html(RetainResult("empty", tmp_path, ()))
