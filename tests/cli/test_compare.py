"""The main job from the command line."""

from __future__ import annotations

import json

import pytest

TINY = ("--model", "mlp", "--epochs", "1", "--controls", "2", "--audits", "utility")


def test_a_study_prints_its_table_and_writes_recipe_results_and_report(run, tmp_path):
    done = run("compare", "--data", "digits", "--forget", "label=3", "--forget", "fraction=0.1",
               "--methods", "finetune,gradient-ascent", "--seeds", "2", "--out", "runs/first", *TINY)  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in (
        "label = 3",
        "a random 0.1",
        "original",
        "retrain",
        "finetune",
        "gradient-ascent",
        "verdict",
    ):
        assert word in done.stdout
    folder = tmp_path / "runs" / "first"
    stored = json.loads((folder / "results.json").read_text())
    assert len(stored["cells"]) == 2 * 2 * 4 and stored["name"] == "first"
    assert "results: runs/first/results.json" in done.stderr
    page = (folder / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "gradient-ascent" in page
    (folder / "report.html").unlink()
    again = run("report", folder)
    assert again.exit_code == 0 and (folder / "report.html").read_text() == page
    other = run("report", folder, "--out", "other.html", "--json")
    assert json.loads(other.stdout)["report"] == "other.html" and (tmp_path / "other.html").is_file()


def test_a_recipe_file_takes_overrides_and_options(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: own\nforget: {fraction: 0.2}\nmethods: [finetune]\naudits: [utility]\ncontrols: 1\n"
    )
    done = run("compare", recipe, "--set", "forget.fraction=0.05", "--model", "mlp", "--epochs", "1",
               "--seeds", "4,5", "--json", "--no-report")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["name"] == "own" and said["cells"] == 3 * 2 and said["failed"] == []
    assert {item["request"] for item in said["summary"]} == {"a random 0.05 of the records (seed 0)"}
    stored = json.loads((tmp_path / "runs" / "own" / "results.json").read_text())
    assert {cell["seeds"]["training"] for cell in stored["cells"]} == {4, 5}


def test_a_method_that_fails_is_in_the_table_and_only_total_failure_is_an_error(run):
    diverging = ("--set", 'methods.0={"name": "finetune", "settings": {"lr": 1.0e+30}, "label": "diverging"}')
    shared = ("--forget", "label=3", "--no-report", *TINY)
    some = run("compare", "--methods", "finetune,gradient-ascent", "--out", "some", *shared, *diverging)
    assert some.exit_code == 0, some.output
    assert "failed 1: NonFiniteLoss" in some.stdout and "failed: diverging" in some.stderr
    every = run("compare", "--methods", "finetune", "--out", "every", *shared, *diverging)
    assert every.exit_code == 3
    assert "failed 1: NonFiniteLoss" in every.stdout


def test_seeds_that_are_no_numbers_are_refused(run):
    done = run("compare", "--forget", "label=3", "--methods", "ssd", "--seeds", "three")
    assert done.exit_code == 2 and "not 'three'" in done.stderr


@pytest.mark.parametrize("folder", ["blocked", "blocked/deeper"])
def test_a_folder_that_cannot_be_made_is_found_before_any_work(run, tmp_path, folder):
    (tmp_path / "blocked").write_text("a file")
    done = run("compare", "--forget", "label=3", "--methods", "finetune", "--out", folder, *TINY)
    assert done.exit_code == 2 and "Cannot write" in done.stderr
