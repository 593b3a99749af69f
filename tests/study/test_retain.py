"""Studies of continual learning: what is stored, what is run again, what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from palimpsest.core.errors import (
    InvalidRecipe,
    InvalidStream,
    ModelMismatch,
    RunLocked,
    UnknownName,
)
from palimpsest.parts.checkpoint import load_model
from palimpsest.retain.state import load_state
from palimpsest.study.retain import load_retain_recipe, open_retain, retain
from palimpsest.study.retain.workshop import RetainWorkshop

RECIPE = {
    "streams": ["class:3x2"],
    "methods": ["finetune", {"name": "er", "settings": {"memory": 40}}],
    "model": {"name": "mlp", "settings": {"width": 16}},
    "training": {"epochs": 2, "batch_size": 32},
    "every": 4,
    "subset": 50,
    "seeds": 1,
}
PROGRAM = """
import json, sys
import palimpsest.retain.methods.er, palimpsest.retain.methods.finetune
from palimpsest.study.retain import retain
if __name__ == "__main__":
    print("ready", flush=True)
    retain(json.loads(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]), progress=False)
"""


def figures(result):
    """All that must not depend on where a study was stopped: everything but times and memory."""
    return {
        (cell.label, cell.stream, cell.seed): (
            cell.status,
            json.dumps([cell.outcome[key] for key in ("matrix", "history", "kept_bytes", "steps", "order")]),
        )
        for cell in result.cells
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return retain(RECIPE, tmp_path_factory.mktemp("first"), progress=False)


def test_every_cell_has_its_matrix_its_curve_and_its_network(first):
    assert [(cell.label, cell.status) for cell in first.cells] == [
        ("finetune", "done"),
        ("er (memory=40)", "done"),
    ]
    for cell in first.cells:
        assert len(cell.outcome["matrix"]) == 3 and cell.outcome["tasks"] == [[0, 1], [2, 3], [4, 5]]
        assert len(cell.outcome["history"]["steps"]) > 5
        assert cell.measure("accuracy") is not None and cell.measure("min-ACC") is not None
        network = (
            RetainWorkshop(load_retain_recipe(first.folder / "recipe.yaml"))
            .run(0, 0, 0)
            .learner.student.model
        )
        load_model(first.folder / "artifacts" / f"{cell.key}.safetensors", network)
    assert not list((first.folder / "artifacts").glob("*.state"))


def test_a_finished_study_is_opened_and_not_run_again(first, tmp_path):
    def never(_jobs):
        assert not list(_jobs)
        return iter(())

    class Idle:
        run = staticmethod(never)

        def close(self):
            raise AssertionError("an executor that is given is closed by its giver")

    again = retain(RECIPE, first.folder, progress=False, executor=Idle())
    assert figures(again) == figures(first) == figures(open_retain(first.folder))


def test_one_more_method_and_seed_run_only_what_is_new(tmp_path):
    small = {**RECIPE, "every": 0}
    before = retain({**small, "methods": ["finetune"]}, tmp_path, progress=False)
    after = retain({**small, "seeds": 2}, tmp_path, progress=False)
    assert len(after.done) == 4
    assert {cell.key for cell in before.cells} < {cell.key for cell in after.cells}
    row = {(item.label, name): mean for item in after.summary() for name, mean in item.measures.items()}
    values = [cell.measure("accuracy") for cell in after.cells if cell.label == "finetune"]
    assert (
        row["finetune", "accuracy"][0] == pytest.approx(sum(values) / 2)
        and row["finetune", "accuracy"][2] == 2
    )


def test_what_changes_the_result_changes_the_key_and_what_does_not_does_not(tmp_path):
    def keys(**changes):
        return {
            job.key for job in RetainWorkshop(load_retain_recipe({**RECIPE, **changes})).jobs(str(tmp_path))
        }

    base = keys()
    assert keys(name="other") == keys(workers=3) == base
    for change in (
        {"streams": ["task:3x2"]},
        {"training": {"epochs": 3}},
        {"every": 5},
        {"seeds": [1]},
        {"test": 0.3},
        {"order": "seed"},
        {"model": {"name": "mlp", "settings": {"width": 17}}},
        {"threads": 2},
    ):
        assert not keys(**change) & base, change


def test_a_methods_own_training_is_told_and_used(tmp_path):
    methods = [{"name": "finetune", "training": {"lr": 0.01}}, "finetune"]
    result = retain({**RECIPE, "every": 0, "methods": methods}, tmp_path, progress=False)
    assert [cell.label for cell in result.cells] == ["finetune (lr=0.01)", "finetune"]
    assert result.cells[0].outcome["matrix"] != result.cells[1].outcome["matrix"]


def test_the_order_of_classes_may_be_drawn_by_the_seed(tmp_path):
    changes = {"order": "seed", "seeds": 2, "methods": ["finetune"], "every": 0}
    one, two = retain({**RECIPE, **changes}, tmp_path, progress=False).cells
    assert one.outcome["order"] != two.outcome["order"]


def test_a_recipe_comes_back_from_its_file(tmp_path):
    recipe = load_retain_recipe(RECIPE, ["training.lr=0.5", "methods.1.settings.memory=9"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_retain_recipe(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load(recipe.to_yaml())["methods"][1]["settings"] == {"memory": 9}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"streamz": []}, InvalidRecipe, "Did you mean 'streams'"),
        ({"training": {"epoch": 1}}, InvalidRecipe, "Did you mean 'epochs'"),
        ({"training": {"lr": -1}}, InvalidRecipe, "lr above 0"),
        ({"methods": [{"name": "er", "training": {"lrr": 1}}]}, InvalidRecipe, "no 'lrr'"),
        ({"methods": ["er", "er"]}, InvalidRecipe, "listed twice"),
        ({"methods": ["err"]}, UnknownName, "Did you mean 'er'"),
        ({"methods": [{"name": "er", "settings": {"memry": 3}}]}, UnknownName, "memory"),
        ({"streams": ["class:9x9"]}, InvalidStream, "classes were asked for"),
        ({"model": {"name": "text_transformer"}}, ModelMismatch, "token ids"),
        ({"device": "cuda:99"}, InvalidRecipe, "cannot be used"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, changes, error, said):
    with pytest.raises(error, match=said):
        retain({**RECIPE, **changes}, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_another_study_is_not_put_into_a_folder(first):
    with pytest.raises(InvalidRecipe, match="model differs"):
        retain({**RECIPE, "model": "mlp"}, first.folder, progress=False)
    with pytest.raises(InvalidRecipe, match="no study of continual learning"):
        open_retain(first.folder / "artifacts")


def test_a_folder_that_is_worked_on_is_not_touched(first):
    from filelock import FileLock

    with FileLock(first.folder / ".lock"), pytest.raises(RunLocked):
        retain(RECIPE, first.folder, progress=False, wait=False)


def test_a_learner_that_fails_is_told_and_the_study_goes_on(tmp_path):
    methods = [{"name": "finetune", "training": {"lr": 1e30}}, "finetune"]
    result = retain({**RECIPE, "every": 0, "methods": methods}, tmp_path, progress=False)
    assert [cell.status for cell in result.cells] == ["failed", "done"]
    assert "NonFiniteLoss" in result.failed[0]


LONG = {
    **RECIPE,
    "methods": RECIPE["methods"][1:],
    "seeds": 6,
    "streams": ["class:5x2"],
    "training": {"epochs": 8, "batch_size": 16},
    "every": 8,
}


def start(folder: Path, workers: int) -> subprocess.Popen[str]:
    script = folder.parent / "study.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script, json.dumps(LONG), folder, str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def killed_in_a_stream(folder: Path, moments: random.Random, workers: int) -> bool:
    """Kill a study at a random moment while a stream is under way; whether one was before the study ended.

    The study is halted first and goes on if no stream is under way then, so that how fast the machine is decides
    nothing; the wait is halved with each miss.
    """
    process = start(folder, workers)
    begun, longest = time.monotonic(), 0.6
    while process.poll() is None and time.monotonic() - begun < 120:
        if list((folder / "artifacts").glob("*.state")):
            time.sleep(moments.uniform(0.0, longest))
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if list((folder / "artifacts").glob("*.state")):
                break
            process.send_signal(signal.SIGCONT)
            longest /= 2
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    states = list((folder / "artifacts").glob("*.state"))
    for state in states:
        assert 1 <= load_state(state)["done"] <= 4
    return process.returncode == -signal.SIGKILL and bool(states)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_study_killed_in_the_middle_of_streams_ends_with_the_same_matrix(tmp_path, workers):
    whole = retain(LONG, tmp_path / "whole", progress=False)
    moments = random.Random(workers)
    hits = [killed_in_a_stream(tmp_path / "run", moments, workers) for _ in range(2)]
    assert hits[0]
    assert figures(retain(LONG, tmp_path / "run", progress=False)) == figures(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_more_kills_change_nothing(tmp_path, seed):
    whole = retain(LONG, tmp_path / "whole", progress=False)
    moments = random.Random(seed)
    hits = sum(killed_in_a_stream(tmp_path / "run", moments, 0) for _ in range(8))
    assert hits >= 2
    assert figures(retain(LONG, tmp_path / "run", progress=False)) == figures(whole)


def test_a_damaged_state_is_left_aside_and_the_cell_begins_anew(tmp_path, first, caplog):
    recipe = load_retain_recipe(RECIPE)
    for job in RetainWorkshop(recipe).jobs(str(tmp_path / "artifacts")):
        (tmp_path / "artifacts").mkdir(exist_ok=True)
        (tmp_path / "artifacts" / f"{job.key}.state").write_bytes(b"not a state")
    assert figures(retain(recipe, tmp_path, progress=False)) == figures(first)
    assert "starts again" in caplog.text
