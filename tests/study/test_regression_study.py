"""Studies of regressions."""

from __future__ import annotations

import pytest

from palimpsest.core.errors import InvalidRecipe, UnknownName
from palimpsest.study.compare import compare, open_run
from palimpsest.study.recipe import load_recipe
from palimpsest.study.workshop import Workshop
from tests.study.studies import tiny

SMALL = tiny(
    data="diabetes",
    task={"name": "regression", "settings": {"standardise": True}},
    forget=["quarter=1"],
    methods=[{"name": "blindspot", "settings": {"batch_size": 64}}],
    audits=["regression", "cost"],
    training={"epochs": 3},
)


def test_a_study_of_a_regression_runs_and_is_opened_again(tmp_path):
    result = compare(SMALL, tmp_path, progress=False)
    assert [cell.status for cell in result.cells] == ["done"] * 3
    for cell in result.cells:
        assert cell.value("regression.forget_mae") > 0 and cell.value("utility.forget_accuracy") is None
    again = open_run(tmp_path)
    assert [cell.value("regression.test_mae") for cell in again.cells] == [
        cell.value("regression.test_mae") for cell in result.cells
    ]
    means = result.summary()[0].means
    assert {"forget error", "test error", "W1 to retrained"} <= set(means) and "forget" not in means
    headings = [column.header for column in result.table().columns]
    assert "forget error" in headings and "membership AUC" not in headings


def test_the_task_is_part_of_what_a_result_depends_on(tmp_path):
    plans = [
        Workshop(load_recipe(SMALL, changes)).plan(str(tmp_path))
        for changes in ([], ["task.settings.loss=mae"], [])
    ]
    keys = [[job.key for job in (*plan.originals, *plan.cells)] for plan in plans]
    assert keys[0] == keys[2] and not set(keys[0]) & set(keys[1])


def test_the_number_of_outputs_and_the_scale_come_from_the_data():
    shop = Workshop(load_recipe(SMALL))
    assert shop.network(0).head.out_features == 1
    trained = shop.splits[0].train.column("label")
    assert shop.task.scale == pytest.approx(float(trained.std(ddof=1)), rel=1e-5)
    quantiles = {"loss": "quantile", "quantiles": [0.1, 0.5, 0.9]}
    other = Workshop(load_recipe({**SMALL, "task": {"name": "regression", "settings": quantiles}}))
    assert other.network(0).head.out_features == 3


def test_recipes_name_the_task_shortly_or_with_settings_and_unknown_ones_are_refused():
    assert load_recipe({**SMALL, "task": "regression"}).task.settings == {}
    assert load_recipe(tiny()).task.name == "classification"
    with pytest.raises(InvalidRecipe, match=r"task\.setings.*Did you mean 'settings'"):
        load_recipe({**SMALL, "task": {"name": "regression", "setings": {}}})
    with pytest.raises(UnknownName, match="Did you mean 'regression'"):
        Workshop(load_recipe({**SMALL, "task": "regresion"})).check()
