"""Figures that claims on continual learning are judged by, on results that are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from palimpsest.core.errors import InvalidRecipe
from palimpsest.study.claims.learned import LEARNED
from palimpsest.study.replication import load_replication
from palimpsest.study.retain import RetainCell, RetainResult, load_retain_recipe
from palimpsest.study.retain.figures import RetainStudied, figure_of

HERE = Path(__file__).parents[2] / "replications"


def cell(label="er", stream="one", seed=0, accuracy=0.8):
    outcome = {
        "matrix": [[0.9, None], [0.5, 0.7]],
        "records": [10, 20],
        "history": {
            "steps": [1, 2, 3, 4, 5],
            "learning": [0, 0, 1, 1, 1],
            "accuracy": [[0.4], [0.9], [0.6, 0.1], [0.2, 0.3], [0.1, 0.7]],
            "sizes": [5, 5],
        },
        "measures": {"accuracy": accuracy, "min-ACC": 0.1, "WC-ACC": 0.3},
    }
    return RetainCell(f"{label}{stream}{seed}", label, label, stream, seed, "done", outcome=outcome)


def test_figures_of_a_cell_are_read_off_its_matrix_and_its_curve():
    found = {
        "accuracy": 0.8, "newest": 0.7, "first": 0.5, "earlier": 0.5, "newest minus earlier": 0.2, "records": 30, "start:1": 0.4, "start:1-2": 0.25,
        "start:2 minus start:1": -0.3, "lowest:1:1": 0.6, "lowest:1:2": 0.2, "lowest:1:30": 0.1,
        "accuracy-over-minimum": 0.7, "accuracy-over-worst-case": 0.5, "hidden-by-task-ends": 0.4,
    }  # fmt: skip
    for name, expected in found.items():
        assert math.isclose(figure_of(cell(), name), expected, abs_tol=1e-12), name
    assert figure_of(cell(), "start:2-3") is None and figure_of(cell(), "unheard-of") is None
    with pytest.raises(InvalidRecipe, match="Cannot read"):
        figure_of(cell(), "start:x")


def test_streams_and_methods_are_compared_with_the_same_seed():
    cells = [
        cell(label, stream, seed, accuracy=base + seed / 10)
        for label, shift in (("er", 0.0), ("plain", -0.2))
        for stream, base in (("one", 0.5 + shift), ("power:6@0.1", 0.7 + shift))
        for seed in (0, 1)
    ]
    studied = RetainStudied(RetainResult("study", Path(), tuple(cells)))
    assert set(studied.units()) == {("one", 0), ("one", 1), ("power:6@0.1", 0), ("power:6@0.1", 1)}
    figure = studied.once()["one", 1]
    assert set(studied.once()) == {("one", 0), ("one", 1)}
    assert figure("er", "accuracy") == pytest.approx(0.6)
    assert figure("er", "accuracy@power:6@0.1") == pytest.approx(0.8)
    assert figure("er", "gain:accuracy@power:6@0.1") == pytest.approx(0.2)
    assert figure("er", "drop:accuracy@one vs power:6@0.1") == pytest.approx(-0.2)
    assert figure("er", "drop:accuracy@one vs power:6@0.1 of plain") == pytest.approx(0.0)
    assert figure("er", "share:records@one vs power:6@0.1") == pytest.approx(1.0)
    assert figure("er", "accuracy@absent") is None


def test_figures_of_gradients_are_read_off_the_rows_of_later_tasks():
    made = cell("er", "one")
    made.outcome["gradients"] = {
        "steps": [0, 1, 2, 3, 4, 5],
        "learning": [0, 1, 1, 1, 2, 2],
        "plasticity": [1.0, 30.0, 4.0, 2.0, 50.0, 3.0],
        "stability": [9.0, 2.0, 1.0, 2.0, 1.0, 1.0],
        "cosine": [0.0] * 6,
    }
    assert figure_of(made, "gradients:first") == 15.0  # of 15 and 50
    assert figure_of(made, "gradients:last:2") == pytest.approx(53 / 2)  # of 6/3 and 53/2
    assert figure_of(made, "gradients:held") == 2.0
    made.outcome["gradients"]["stability"] = [0.0] * 6
    assert figure_of(made, "gradients:held") == 0.0 and figure_of(made, "gradients:first") == float("inf")
    with pytest.raises(InvalidRecipe, match="last:STEPS"):
        figure_of(made, "gradients:middle")
    assert figure_of(cell("er", "one"), "gradients:first") is None


@pytest.mark.parametrize(
    "slug", ["cl-baselines", "stability-gap", "power-law", "view-batch", "fpf", "sharp", "prompting"]
)
def test_the_replications_can_be_read_and_their_claims_name_what_is_there(slug):
    replication = load_replication(HERE / f"{slug}.yaml")
    recipes = {name: load_retain_recipe({"name": name, **tree}) for name, tree in replication.studies.items()}
    for claim in replication.claims:
        recipe = recipes[claim.study]
        titles = {method.title for method in recipe.methods}
        assert set(claim.labels) <= titles
        for condition in claim.conditions:
            assert condition.minus is None or condition.minus in titles
            places = condition.metric.partition("@")[2]
            named = [part.partition(" of ")[0] for part in places.split(" vs ")] if places else []
            assert set(named) <= set(recipe.streams), condition.metric


def test_a_measurement_learns_the_stream_again_and_is_made_once(monkeypatch):
    recipe = load_retain_recipe(
        {
            "streams": ["class:2,2,6"],
            "methods": [{"label": "er", "name": "er", "settings": {"memory": 20}}],
            "model": {"name": "mlp", "settings": {"width": 8}},
            "training": {"batch_size": 64},
        }
    )
    made, taken = RetainStudied(RetainResult("study", Path(), (cell("er", "class:2,2,6"),)), recipe), []

    def steps(learned):
        taken.append(learned)
        assert learned.fresh.done == 0
        return float(learned.finished.done)

    monkeypatch.setitem(LEARNED._entries, "test.steps", steps)
    figure = made.units()["class:2,2,6", 0]
    assert figure("er", "measure:test.steps") == figure("er", "measure:test.steps") == 3
    assert figure("er", "measure:test.steps@class:2,2,6") == 3 and len(taken) == 1
    with pytest.raises(InvalidRecipe, match="need the recipe"):
        RetainStudied(made.result).units()["class:2,2,6", 0]("er", "measure:test.steps")


@pytest.mark.parametrize("slug", ["uer", "hpcr", "prd", "napa-vq"])
def test_claims_speak_of_measurements_that_exist(slug):
    replication = load_replication(HERE / f"{slug}.yaml")
    for claim in replication.claims:
        assert claim.study in replication.studies
        for condition in claim.conditions:
            if condition.metric.startswith("measure:"):
                assert LEARNED.get(condition.metric.partition(":")[2].partition("@")[0])
