"""The guide to regressions, done as told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
from tests.docs.code_blocks import blocks
from typer.testing import CliRunner

import palimpsest as pal
from palimpsest.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "regression.md"


def do(command: str):
    words = shlex.split(command)
    assert words[0] == "palimpsest"
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    return done


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = blocks(PAGE, "python")
    names: dict[str, object] = {}
    exec(first, names)
    exec(second, names)
    report = names["report"]
    assert report.facts["controls"] == 2 and Path("regression.html").stat().st_size > 10_000
    assert "anamnesis.index" in capsys.readouterr().out
    error, untouched = (
        report.finding("regression.forget_mae"),
        report.finding("regression.forget_mae").original,
    )
    assert error.value > untouched  # it forgets


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    study, saved = blocks(PAGE, "bash")
    shown = do(study)
    assert "forget error" in shown.stdout and "blindspot" in shown.stdout
    stored = json.loads(Path("runs/regression/results.json").read_text())
    assert {cell["status"] for cell in stored["cells"]} == {"done"}
    assert Path("runs/regression/report.html").exists()
    forget, audit = saved.strip().splitlines()
    records = pal.load_data("diabetes")
    parts = pal.split(records, pal.by_column("quarter", 1), test=0.2, holdout=0.2, seed=0)
    task = pal.tasks.Regression(standardise=True).fitted(parts.train)
    network = pal.build_model("mlp", (10,), 1, seed=0, width=64)
    model = pal.train(network, parts.train, task, epochs=5, batch_size=32)
    pal.save_model(model, "model.safetensors")
    do(forget)
    after = pal.load_model("forgot.safetensors", network)
    wanted = pal.forget(model, parts, "blindspot", task, epochs=3)
    same = [
        np.allclose(a.detach(), b.detach(), atol=1e-5)
        for a, b in zip(after.parameters(), wanted.parameters(), strict=True)
    ]
    assert all(same)  # the command scales targets as Python does
    do(audit)
    assert "mean absolute error" in Path("report.html").read_text()


def test_bad_words_are_refused_by_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = blocks(PAGE, "bash")[0].strip()
    for change, said in (
        (("--task regression", "--task regresion"), "Did you mean 'regression'"),
        (("standardise=true", "loss=mean"), "loss must be one of"),
        (("standardise=true", "standardize=true"), "Did you mean 'standardise'"),
        (("--data diabetes", "--data digits"), "Classification"),
        (("--methods blindspot", "--methods scrub"), "does not work for regression"),
        (("--task regression --set task.settings.standardise=true", ""), "set task: regression"),
    ):
        words = shlex.split(study.replace(*change))[1:]
        if "--data digits" in change[1]:
            words = [word.replace("quarter=1", "label=3") for word in words]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and said in done.output + done.stderr, (change, done.output)
    assert not Path("runs").exists()
