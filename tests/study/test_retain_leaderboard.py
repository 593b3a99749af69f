"""The leaderboard of learners: searched on one stream, reported on another."""

import json

import pytest

from palimpsest.core.errors import InvalidRecipe, PalimpsestError
from palimpsest.retain import LEARNERS
from palimpsest.study.retain.leaderboard import (
    RetainLeaderboard,
    load_retain_leaderboard,
    report_recipe,
    run_retain_leaderboard,
    search_recipe,
    to_markdown,
)

TINY = {
    "kind": "retain",
    "name": "tiny",
    "title": "Tiny",
    "memory": 30,
    "seeds": 2,
    "methods": [
        {"name": "finetune"},
        {"name": "er", "search": {"replay_batch": [4, 8]}},
        {"name": "icarl", "rates": [0.1]},
    ],
    "boards": {
        "rotated": {
            "title": "Rotated digits",
            "recipe": {"data": "digits", "streams": ["domain:rotated:0,40"], "model": "mlp", "training": {"batch_size": 64}},
            "tune": {"streams": ["domain:permuted:2"]},
            "rates": [0.0001, 0.1],
            "skip": {"icarl": "needs new classes"},
        }
    },
}  # fmt: skip


def test_every_combination_is_searched_on_the_other_stream_with_a_seed_that_is_not_reported():
    board = RetainLeaderboard.model_validate(TINY)
    recipe = search_recipe(board, board.boards["rotated"])
    assert recipe.streams == ["domain:permuted:2"]
    assert recipe.seeds == [2]
    assert [method.name for method in recipe.methods] == ["finetune"] * 2 + ["er"] * 4
    assert {method.settings["memory"] for method in recipe.methods if method.name == "er"} == {30}


def test_the_better_rate_is_reported_over_all_seeds_and_an_interrupted_board_goes_on(tmp_path):
    board = RetainLeaderboard.model_validate(TINY)
    path = run_retain_leaderboard(board, tmp_path / "runs", tmp_path, workers=0, progress=False)
    content = json.loads(path.read_text())
    rows = {row["learner"]: row for row in content["boards"]["rotated"]["rows"]}
    assert set(rows) == {"finetune", "er"}
    assert all(row["found"]["lr"] == 0.1 for row in rows.values())  # the other does not learn in one pass
    assert rows["er"]["measures"]["accuracy"][2] == 2
    page = path.with_suffix(".md").read_text()
    assert "icarl: needs new classes" in page
    again = run_retain_leaderboard(board, tmp_path / "runs", tmp_path, workers=0, progress=False)
    assert json.loads(again.read_text())["boards"] == content["boards"]


def test_a_board_that_is_not_there_and_a_file_that_is_none_are_refused(tmp_path):
    board = RetainLeaderboard.model_validate(TINY)
    with pytest.raises(InvalidRecipe, match="no board 'nowhere'"):
        run_retain_leaderboard(board, tmp_path / "runs", tmp_path, boards=["nowhere"])
    file = tmp_path / "bad.yaml"
    file.write_text("kind: retain\nname: x\n")
    with pytest.raises(InvalidRecipe, match="cannot be used"):
        load_retain_leaderboard(file)


def test_what_a_later_board_refuses_is_refused_before_the_first_search(tmp_path):
    boards = {
        **TINY["boards"],
        "later": {**TINY["boards"]["rotated"], "skip": {}, "recipe": {**TINY["boards"]["rotated"]["recipe"]}},
    }
    board = RetainLeaderboard.model_validate({**TINY, "boards": boards})
    with pytest.raises(PalimpsestError, match="icarl"):
        run_retain_leaderboard(board, tmp_path / "runs", tmp_path, workers=0, progress=False)
    assert not (tmp_path / "runs").exists()


def test_a_learner_that_no_search_carried_to_the_end_is_named_as_failed(tmp_path):
    wild = {**TINY, "methods": [{"name": "finetune"}, {"name": "er", "rates": [1e30]}], "seeds": 1}
    path = run_retain_leaderboard(
        RetainLeaderboard.model_validate(wild), tmp_path / "runs", tmp_path, workers=0, progress=False
    )
    board = json.loads(path.read_text())["boards"]["rotated"]
    assert [row["learner"] for row in board["rows"]] == ["finetune"]
    assert any(line.startswith("er:") for line in board["failed"])


def test_a_row_says_over_how_many_seeds_it_is_where_some_failed():
    row = {"learner": "er", "measures": {"accuracy": [0.5, None, 1]}, "found": {"lr": 0.1}}
    board = {
        "title": "B",
        "note": "Read this first.",
        "setting": "s",
        "rows": [row],
        "skipped": {},
        "failed": ["er, seed 1: it diverged"],
    }
    page = to_markdown({"title": "T", "memory": 1, "seeds": 2, "boards": {"b": board}})
    assert "| er (1 of 2 seeds) | 50.0 | lr 0.1 |" in page and "Failed: er, seed 1: it diverged" in page
    assert page.index("Read this first.") < page.index("| learner |")


def test_every_learner_is_on_a_board_of_the_project_and_every_board_can_be_run():
    leaderboard = load_retain_leaderboard("leaderboards/retain.yaml")
    shown = set()
    for board in leaderboard.boards.values():
        shown |= {method.name for method in search_recipe(leaderboard, board).methods}
        if board.recipe["data"] == "digits":  # other data are not on every machine
            report_recipe(leaderboard, board, {method.name: method for method in leaderboard.methods}, "x")
    assert shown == set(LEARNERS.names())
