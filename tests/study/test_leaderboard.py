from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from palimpsest.core.errors import InvalidRecipe, UnknownName
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.study.leaderboard import Leaderboard, load_leaderboard, run_leaderboard, to_markdown
from palimpsest.study.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SMALL = {"model": {"name": "mlp", "settings": {"width": 16}}, "training": {"epochs": 4, "lr": 0.003},
         "audits": ["utility", "membership", "relearning", "representation"], "controls": 2}  # fmt: skip
BOARD = Leaderboard.model_validate({
    "name": "small", "title": "A small one", "seeds": 2, "trials": 2, "methods": ["ssd"],
    "boards": {
        "one": {"title": "One class", "recipe": SMALL, "tune": ["label=7"], "forget": ["label=3"]},
        "two": {"title": "A tenth", "recipe": SMALL, "tune": ["fraction=0.1@7"], "forget": ["fraction=0.1"],
                "skip": {"finetune": "not wanted here"}},
    },
})  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("board")
    path = run_leaderboard(BOARD, place / "runs", place / "results", workers=0, progress=False)
    return place, json.loads(path.read_text())


def test_every_request_has_a_row_per_method_with_every_figure(results):
    _, content = results
    assert list(content["boards"]) == ["one", "two"]
    (rows,) = content["boards"]["one"]["requests"].values()
    assert [row["label"] for row in rows] == ["original", "retrain", "ssd"]
    for row in rows:
        assert row["failures"] == [] and sum(row["verdicts"].values()) == 2
        assert {
            "retain",
            "test",
            "gap forget",
            "gap membership",
            "gap relearning",
            "gap representation",
        } <= set(row["figures"])
        for mean in row["figures"].values():
            assert mean["n"] == 2 and np.isfinite([mean["mean"], mean["half_width"]]).all()
    original, retrained = rows[0]["figures"], rows[1]["figures"]
    assert original["gap forget"]["mean"] > 0.5 > 0.1 > retrained["gap forget"]["mean"]


def test_the_settings_that_were_found_are_those_that_were_run(results):
    place, content = results
    found = content["boards"]["one"]["tuned"]["ssd"]["settings"]
    (file,) = (place / "runs" / "one" / "compare").glob("*/recipe.yaml")
    recipe = load_recipe(file)
    assert [method.settings for method in recipe.methods if method.name == "ssd"] == [found]
    assert content["boards"]["one"]["tuned_on"] == ["label = 7"]


def test_the_page_says_what_the_json_says(results):
    place, content = results
    page = (place / "results" / "small.md").read_text()
    assert page == to_markdown(content)
    (rows,) = content["boards"]["two"]["requests"].values()
    assert f"{100 * rows[0]['figures']['test']['mean']:.1f}" in page
    assert "finetune: not wanted here" in page


def test_boards_that_are_not_run_keep_their_results(results, tmp_path):
    place, content = results
    path = run_leaderboard(
        BOARD, place / "runs", place / "results", boards=["one"], workers=0, progress=False
    )
    assert json.loads(path.read_text())["boards"]["two"] == content["boards"]["two"]


def test_a_request_cannot_be_tuned_and_reported(tmp_path):
    board = BOARD.boards["one"].model_copy(update={"tune": ["label=3"]})
    cheat = BOARD.model_copy(update={"boards": {"one": board}})
    with pytest.raises(InvalidRecipe, match="tuned on the request"):
        run_leaderboard(cheat, tmp_path / "runs", tmp_path / "results", workers=0, progress=False)


def test_unknown_boards_methods_and_keys_are_refused(tmp_path):
    with pytest.raises(InvalidRecipe, match="no board 'three'"):
        run_leaderboard(BOARD, tmp_path, tmp_path, boards=["three"])
    with pytest.raises(UnknownName):
        run_leaderboard(BOARD.model_copy(update={"skip": {"sdd": "?"}}), tmp_path, tmp_path)
    (tmp_path / "bad.yaml").write_text("name: x\ntitle: y\nboard: {}\n")
    with pytest.raises(InvalidRecipe, match="cannot be used"):
        load_leaderboard(tmp_path / "bad.yaml")
    assert not list(tmp_path.glob("*.json"))


def test_the_leaderboard_of_classifiers_reports_no_request_that_it_tunes_on_and_leaves_out_no_method():
    board = load_leaderboard(ROOT / "leaderboards" / "classifier.yaml")
    assert board.seeds >= 3 and not board.methods
    for settings in board.boards.values():
        assert not {str(item) for item in settings.tune} & {str(item) for item in settings.forget}
    assert set(board.skip) <= set(UNLEARNERS.names())
