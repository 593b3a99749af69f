"""Membership attacks with shadow models from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import palimpsest as pal
from palimpsest.models import build_model

SHADOW = ("--audits", "shadow-membership", "--audit-set", "shadow-membership.runs=6")


def shadows(folder: Path) -> list[dict]:
    return [json.loads(place.read_text()) for place in sorted(folder.glob("*.json"))]


def test_a_study_trains_shadow_models_once_for_all_methods_and_names_the_most_exposed(run, tmp_path):
    command = ("compare", "--forget", "fraction=0.1", "--methods", "finetune", "--model", "mlp", "--epochs", "1",
               "--controls", "1", "--out", "run", *SHADOW, "--audit-set", "shadow-membership.attacks=lira,ulira",
               "--audit-set", "shadow-membership.exposed=4")  # fmt: skip
    done = run(*command)
    assert done.exit_code == 0, done.output
    made = shadows(tmp_path / "run" / "artifacts" / "shadows")
    kinds = [note["kind"] if note["kind"] == "trained" else note["method"] for note in made]
    # 6 runs, each trained and retrained once, whatever is judged; what a method makes of them is its own.
    assert {kind: kinds.count(kind) for kind in kinds} == {"trained": 12, "finetune": 6, "retrain": 6}
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    reports = {cell["label"]: cell["report"] for cell in stored["cells"]}
    assert all(cell["status"] == "done" for cell in stored["cells"])
    found = {
        item["name"]: item for item in reports["original"]["findings"] if item["audit"] == "shadow-membership"
    }
    assert found["ulira_accuracy"]["value"] == found["ulira_accuracy"]["original"]
    rows = [row for row in reports["finetune"]["series"]["exposed"] if row["attack"] == "online"]
    assert len(rows) == 4
    named = re.search(r"most exposed \(online; finetune, .*?\): (.*)", done.stderr)
    assert named and named[1].split(", ") == [row["id"] for row in rows]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Most exposed records" in page and all(f"<code>{row['id']}</code>" in page for row in rows)


def test_an_audit_of_saved_models_takes_settings_and_prints_the_most_exposed(run, tmp_path, digits_task):
    records = pal.load_data("digits")
    request = pal.split(records, pal.by_fraction(0.1, seed=0), test=0.2, holdout=0.2, seed=0)
    network = build_model("mlp", (1, 8, 8), 10, seed=0, width=8)
    model = pal.train(network, request.train, task=digits_task, epochs=1, seed=0)
    pal.save_model(model, tmp_path / "model.safetensors")
    pal.save_model(
        pal.forget(model, request, "retrain", digits_task, seed=1), tmp_path / "retrained.safetensors"
    )
    given = ("audit", "--original", "model.safetensors", "--unlearned", "model.safetensors", "--retrained",
             "retrained.safetensors", "--arch", "mlp", "--arch-set", "width=8", "--data", "digits",
             "--forget", "fraction=0.1")  # fmt: skip
    more = (
        "--audit-set",
        "shadow-membership.folder=shadows",
        "--audit-set",
        "shadow-membership.attacks=lira,rmia",
    )
    done = run(*given, *SHADOW, *more)
    assert done.exit_code == 0, done.output
    assert "most exposed records (online)" in done.stdout and "false alarms" in done.stdout
    assert len(shadows(tmp_path / "shadows")) == 6
    times = {place: place.stat().st_mtime_ns for place in (tmp_path / "shadows").iterdir()}
    again = run(*given, *SHADOW, *more, "--json")
    exposed = json.loads(again.stdout)["series"]["exposed"]
    assert len(exposed) == 20 and exposed[0]["id"] in done.stdout
    assert times == {place: place.stat().st_mtime_ns for place in (tmp_path / "shadows").iterdir()}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--audit-set", "shadow-membership.run=8"), "Did you mean 'runs'"),
        (("--audit-set", "membership.folds=3"), "Unknown audit in --audits 'membership'"),
        (("--audit-set", "runs=8"), "AUDIT.KEY=VALUE"),
        (("--audit-set", "shadow-membership.runs=7"), "even number of runs"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(run, settings, words):
    study = ("compare", "--forget", "fraction=0.1", "--methods", "finetune", "--no-report")
    done = run(*study, "--audits", "shadow-membership", *settings)
    assert done.exit_code == 2 and words in done.output.replace("\n", " ")
