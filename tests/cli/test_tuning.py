"""Tuning and leaderboards from the command line."""

from __future__ import annotations

import json

import pytest

SMALL = ("--model", "mlp", "--epochs", "2", "--set", "controls=1", "--workers", "0")


def test_what_was_tuned_is_compared_on_another_request_and_refused_on_its_own(run, tmp_path):
    done = run("tune", "--forget", "label=7", "--methods", "ssd", "--trials", "2", "--gaps", "forget,retain",
               "--search", "ssd.alpha=5..50:log", "--out", "tuned", "--json", *SMALL)  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["methods"]["ssd"]["space"] == {"alpha": "5..50:log"}
    settings = said["methods"]["ssd"]["settings"]
    shared = (
        "--methods",
        "ssd",
        "--tuned",
        "tuned",
        "--audits",
        "utility",
        "--out",
        "run",
        "--no-report",
        *SMALL,
    )
    other = run("compare", "--forget", "label=3", "--json", *shared)
    assert other.exit_code == 0, other.output
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {
        json.dumps(cell["report"]["facts"]["settings"]) for cell in stored["cells"] if cell["label"] == "ssd"
    } == {json.dumps(settings)}
    same = run("compare", "--forget", "label=7", *shared)
    assert same.exit_code == 2 and "tuned on the request" in same.stderr


@pytest.mark.parametrize("search", ["ssd", "alpha=1..2", "ssd.alpha"])
def test_a_space_that_cannot_be_read_is_refused(run, search):
    done = run("tune", "--forget", "label=7", "--methods", "ssd", "--search", search)
    assert done.exit_code == 2 and "METHOD.KEY=SPACE" in done.stderr


def test_requests_in_turn_print_what_became_of_the_first(run, tmp_path):
    done = run("compare", "--forget", "label=3", "--forget", "label=5", "--in-turn", "--methods", "ssd",
               "--audits", "utility", "--out", "run", "--markdown", "page.md", *SMALL)  # fmt: skip
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.md").read_text()
    assert "## label = 3, at the end" in page and "| retrain | " in page and "re-emergence" in page
    assert "label = 3, at the end" in done.stdout and "re-emergence" in done.stdout


def test_a_leaderboard_is_written_where_it_is_asked_for(run, tmp_path):
    (tmp_path / "board.yaml").write_text(
        "name: own\ntitle: Own\nseeds: 1\ntrials: 1\nmethods: [finetune]\nboards:\n  a:\n    title: A\n"
        "    recipe: {model: mlp, training: {epochs: 1}, controls: 1, audits: [utility]}\n"
        "    tune: ['label=7']\n    forget: ['label=3']\n"
    )
    done = run("leaderboard", "board.yaml", "--results", "results", "--workers", "0", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "results" / "own.json").read_text())
    assert "finetune" in (tmp_path / "results" / "own.md").read_text()
