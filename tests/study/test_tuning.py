from __future__ import annotations

import json

import pytest

from palimpsest.core.errors import InvalidRecipe, UnknownName
from palimpsest.core.search_space import Choice, Span
from palimpsest.study.compare import compare
from palimpsest.study.executors import LocalExecutor
from palimpsest.study.headline import audits_of_figures, gap
from palimpsest.study.recipe import load_recipe
from palimpsest.study.tuned import Tried, load_tuned, with_tuned
from palimpsest.study.tuning import tune
from tests.study.studies import tiny

RECIPE = tiny(
    forget=["label=7"],
    methods=["gradient-ascent", {"name": "finetune", "settings": {"epochs": 1}}],
    training={"epochs": 6, "lr": 0.003},
)
SEARCH = {"gradient-ascent": {"lr": Span(1e-6, 1e-2, log=True)}}
OPTIONS = {"trials": 4, "gaps": ("forget", "test"), "search": SEARCH, "progress": False}


class Interrupted(LocalExecutor):
    """Stops after so many cells."""

    def __init__(self, cells: int):
        super().__init__()
        self.left = cells

    def run(self, jobs):
        for done in super().run(jobs):
            yield done
            self.left -= done.status == "done" and bool(done.report)
            if self.left <= 0:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return tune(RECIPE, tmp_path_factory.mktemp("tuning"), **OPTIONS)


def test_the_first_trial_is_the_defaults_and_the_best_is_no_worse(tuned):
    for item in tuned.methods.values():
        assert len(item.trials) == 4
        best = min((trial for trial in item.trials if trial.share <= tuned.budget), key=lambda t: t.score)
        assert (item.settings, item.gap) == (best.settings, best.gap)
        assert best.score <= item.trials[0].score
    first = tuned.methods["gradient-ascent"].trials[0].settings
    assert first == {}
    assert all(1e-6 <= trial.settings["lr"] <= 1e-2 for trial in tuned.methods["gradient-ascent"].trials[1:])


def test_what_a_recipe_fixes_is_not_searched(tuned):
    (label,) = [label for label in tuned.methods if label.startswith("finetune")]
    assert tuned.methods[label].space.keys() == {"lr"}
    assert {trial.settings["epochs"] for trial in tuned.methods[label].trials} == {1}


def test_the_gap_is_the_distance_to_the_retrained_models(tuned, tmp_path):
    best = tuned.methods["gradient-ascent"]
    recipe = {**RECIPE, "methods": [{"name": "gradient-ascent", "settings": best.settings}]}
    (cell,) = compare(recipe, tmp_path / "run", progress=False).select("gradient-ascent")
    by_hand = [
        abs(cell.value(key) - cell.finding(key).controls[0])
        for key in ("utility.forget_accuracy", "utility.test_accuracy")
    ]
    assert best.gap == pytest.approx(sum(by_hand) / 2)
    assert gap(cell, "relearning") is None


def test_an_interrupted_search_goes_on_to_the_same_end(tuned, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tune(RECIPE, tmp_path, **OPTIONS, executor=Interrupted(7))
    again = tune(RECIPE, tmp_path, **OPTIONS)
    for label, item in tuned.methods.items():
        other = again.methods[label]
        assert [(t.settings, t.gap) for t in other.trials] == [(t.settings, t.gap) for t in item.trials]
    assert load_tuned(tmp_path) == again


def test_a_budget_rules_out_what_costs_more(tmp_path):
    found = tune(RECIPE, tmp_path, **{**OPTIONS, "trials": 1}, budget=1e-9)
    for item in found.methods.values():
        assert not item.within_budget and item.share > 1e-9


def test_trials_that_fail_are_noted_and_passed_over(tmp_path):
    recipe = {**RECIPE, "methods": ["finetune"]}
    search = {"finetune": {"lr": Choice((0.01, 1e30))}}
    found = tune(recipe, tmp_path, trials=6, gaps=["forget"], search=search, progress=False).methods[
        "finetune"
    ]
    failed = [trial for trial in found.trials if trial.gap is None]
    assert failed and all(trial.settings["lr"] == 1e30 and trial.reason for trial in failed)
    assert found.gap is not None and found.settings.get("lr", 0.01) == 0.01


def test_what_was_found_is_used_on_other_requests_only(tuned):
    other = load_recipe({**RECIPE, "forget": ["label=3"], "methods": ["gradient-ascent", "ssd"]})
    ready = with_tuned(other, tuned)
    assert ready.methods[0].settings == tuned.methods["gradient-ascent"].settings
    assert ready.methods[0].title == "gradient-ascent" and ready.methods[1].settings == {}
    own = load_recipe({**RECIPE, "methods": [{"name": "gradient-ascent", "settings": {"lr": 0.5}}],
                       "forget": ["label=3"]})  # fmt: skip
    assert with_tuned(own, tuned).methods[0].settings["lr"] == 0.5
    for same in ("label=7", {"label": 7, "name": "by another name"}):
        with pytest.raises(InvalidRecipe, match="tuned on"):
            with_tuned(load_recipe({**RECIPE, "forget": [same]}), tuned)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"gaps": ["forgot"]}, UnknownName),
        ({"gaps": []}, InvalidRecipe),
        ({"trials": 0}, InvalidRecipe),
        ({"budget": 0.0}, InvalidRecipe),
        ({"search": {"ssd": {"alpha": Span(1, 2)}}}, UnknownName),
        ({"search": {"gradient-ascent": {"rate": Span(1, 2)}}}, UnknownName),
        ({"overrides": ["in_turn=true"]}, InvalidRecipe),
    ],
)
def test_bad_input_is_found_before_any_work(change, error, tmp_path):
    with pytest.raises(error):
        tune(RECIPE, tmp_path / "out", **{**OPTIONS, **change})
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "tuned.json").write_text(json.dumps({"methods": {}}))
    with pytest.raises(InvalidRecipe, match="no result of a search"):
        load_tuned(tmp_path)
    with pytest.raises(InvalidRecipe, match="Cannot read"):
        load_tuned(tmp_path / "absent.json")


@pytest.mark.parametrize("task", ["classification", "language"])
def test_every_gap_is_measured_by_an_audit_that_runs_by_default(task):
    from palimpsest.core.auditing import AUDITS

    measured = audits_of_figures(task)
    assert {"forget", "retain", "test", "relearning"} <= set(measured)
    for name in measured.values():
        card = AUDITS.get(name).card
        assert card.default and task in card.tasks


def test_accuracy_that_is_lost_beyond_damage_weighs_more_than_any_gap():
    kept, lost = Tried(settings={}, gap=0.3), Tried(settings={}, gap=0.05, damage=0.1)
    assert kept.score < lost.score
    assert Tried(settings={}, reason="diverged").score == float("inf")


def test_damage_is_what_is_lost_against_retraining(tuned, tmp_path):
    wild = {
        **RECIPE,
        "methods": [{"name": "gradient-ascent", "settings": {"lr": 0.1, "stop_accuracy": None}}],
    }
    found = tune(wild, tmp_path / "wild", trials=1, gaps=["forget"], search={}, progress=False)
    (trial,) = next(iter(found.methods.values())).trials
    (cell,) = compare(wild, tmp_path / "run", progress=False).select("gradient-ascent")
    lost = max(
        cell.finding(key).controls[0] - cell.value(key)
        for key in ("utility.retain_accuracy", "utility.test_accuracy")
    )
    assert lost > 0.3 and trial.damage == pytest.approx(lost - 0.05)
