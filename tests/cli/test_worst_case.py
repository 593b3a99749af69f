"""`worst-case` on the command line, and `compare` on what it found."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

import palimpsest as pal
from palimpsest.models import build_model
from palimpsest.study.worst_case import WorstCase

SMALL = ("--data", "digits", "--arch", "mlp", "--arch-set", "width=32")
TINY = (*SMALL, "--epochs", "6", "--lr", "0.003")


@pytest.fixture(scope="module")
def weights(tmp_path_factory, class_request, digits_task):
    """A small network trained on the digits, with and without its recipe in the file."""
    folder = tmp_path_factory.mktemp("weights")
    network = build_model("mlp", (1, 8, 8), 10, seed=0, width=32)
    model = pal.train(network, class_request.train, task=digits_task, epochs=3, seed=0, lr=3e-3)
    pal.save_model(model, folder / "model.safetensors")
    network.load_state_dict(model.state_dict())
    pal.save_model(network, folder / "bare.safetensors")
    return folder


def test_a_set_is_found_and_compare_forgets_it_from_the_same_model(run, class_request):
    done = run("worst-case", *TINY, "--size", "10%", "--steps", "2", "--out", "worst.json", "--json")
    assert done.exit_code == 0, done.output
    said, stored = json.loads(done.stdout), json.loads(Path("worst.json").read_text())
    assert "scores" not in said and len(stored["scores"]) == len(class_request.train) == 1079
    assert said["ids"] == stored["ids"] and len(stored["ids"]) == 108
    assert set(stored["ids"]) <= set(class_request.train.ids)
    assert {"objective", "non_binary", "moved"} <= set(said["history"][-1])
    table = {row["set"]: row for row in said["summary"]}
    assert set(table) == {"hardest", "random", "lowest-loss"}
    assert table["hardest"]["ua"] < table["random"]["ua"]
    assert table["hardest"]["forget_loss"] < table["random"]["forget_loss"]
    forgets = ("--forget", "worst.json", "--forget", "fraction=0.1")
    compared = run("compare", "--data", "digits", *forgets, "--methods", "finetune", "--model", "mlp",
                   "--set", "model.settings.width=32", "--epochs", "6", "--set", "training.lr=0.003",
                   "--controls", "1", "--audits", "utility", "--no-report", "--out", "run")  # fmt: skip
    assert compared.exit_code == 0, compared.output
    cells = json.loads(Path("run/results.json").read_text())["cells"]
    assert {cell["request"] for cell in cells} == {"worst.json", "a random 0.1 of the records (seed 0)"}
    retrained = {
        cell["request"]: finding["value"]
        for cell in cells
        if cell["label"] == "retrain"
        for finding in cell["report"]["findings"]
        if finding["name"] == "forget_accuracy"
    }
    assert retrained["worst.json"] > retrained["a random 0.1 of the records (seed 0)"]
    # one original for both requests: the one that the search was made on; then a control and a cell each
    originals = [
        path for path in Path("run/artifacts").glob("*.safetensors") if _same(path, "worst.safetensors")
    ]
    assert len(originals) == 1


def _same(one, two):
    network = build_model("mlp", (1, 8, 8), 10, width=32)
    states = [pal.load_model(path, network).state_dict() for path in (one, two)]
    return all((states[0][name] == value).all() for name, value in states[1].items())


def test_methods_are_judged_on_every_set_with_rates_chosen_on_the_random_one(run, weights):
    shared = ("worst-case", *SMALL, "--model", weights / "model.safetensors", "--size", "100", "--steps", "1")
    more = ("--methods", "finetune", "--set", "finetune.epochs=1", "--set", "finetune.lr=[0.00001,0.01]")
    done = run(*shared, *more, "--out", "worst.json", "--seeds", "2", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    rows = [row for row in said["summary"] if row["method"] == "finetune"]
    assert {row["set"] for row in rows} == {"hardest", "random", "lowest-loss"}
    assert len({json.dumps(row["settings"]) for row in rows}) == 1 and all(row["gap"] > 0 for row in rows)
    assert sum(not row["chosen"] for row in said["evaluation"]) == 1
    assert Path("worst.safetensors").exists() is False
    shown = run(*shared, *more, "--out", "worst.json", "--seeds", "2")
    assert shown.exit_code == 0 and "objective" in shown.stdout and "neither 0 nor 1" in shown.stdout
    assert "± " in shown.stdout and "lowest-loss" in shown.stdout and "finetune, epochs=1" in shown.stdout


def test_a_search_by_class_and_one_below_another_method_say_what_they_are(run, weights):
    shared = (*SMALL, "--model", weights / "bare.safetensors", "--steps", "1", "--no-evaluate")
    done = run("worst-case", *shared, "--by", "class", "--goal", "easiest", "--out", "class.json")
    assert done.exit_code == 0, done.output
    found = WorstCase.load("class.json")
    assert len(found.classes) == 1 and f"(classes {found.classes[0]}), easiest to forget" in done.stdout
    done = run("worst-case", *shared, "--size", "0.05", "--lower", "finetune", "--lower-set", "epochs=1",
               "--out", "finetune.json", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert "does not move by signs" in said["caution"] and said["settings"]["lower_settings"]["epochs"] == 1
    assert len(said["ids"]) == 54 and said["summary"] == []


def test_an_interrupted_search_goes_on_with_the_same_command(start, run, tmp_path, weights):
    words = ["worst-case", *SMALL, "--model", weights / "bare.safetensors", "--size", "50", "--no-evaluate",
             "--steps", "25", "--lower-set", "epochs=2", "--upper-lr", "1", "--json"]  # fmt: skip
    part = tmp_path / "worst.json.part"
    process = start(*words, "--out", "worst.json")
    limit = time.monotonic() + 120
    while not part.exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "resume with the same command" in errors and "Traceback" not in errors and output == ""
    before = json.loads(part.read_text())["history"]
    assert 1 <= len(before) < 25 and not (tmp_path / "worst.json").exists()
    resumed = run(*words, "--out", "worst.json")
    whole = run(*words, "--out", "whole.json")
    found, truth = json.loads(resumed.stdout), json.loads(whole.stdout)
    assert len(found["history"]) == 25 and found["history"][: len(before)] == before
    assert {**found, "out": ""} == {**truth, "out": ""}
    stored = [json.loads((tmp_path / name).read_text())["scores"] for name in ("worst.json", "whole.json")]
    assert stored[0] == stored[1] and not part.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--size": "0"}, "at least 1 and below the 1079"),
        ({"--size": "-5"}, "at least 1"),
        ({"--size": "1079"}, "below the 1079"),
        ({"--size": "12.5"}, "must be an integer"),
        ({"--size": "100%"}, "below 100%"),
        ({"--size": "many"}, "not 'many'"),
        ({"--size": None}, "Say how many records"),
        ({"--by": "class", "--size": "11"}, "below the 10 classes"),
        ({"--by": "prompt"}, "by must be one of record, class"),
        ({"--goal": "worst"}, "goal must be one of hardest, easiest"),
        ({"--steps": "0"}, "steps must lie in"),
        ({"--upper-lr": "0"}, "upper_lr must lie in"),
        ({"--gamma": "-1"}, "gamma must lie in"),
        ({"--lower": "sign-finetun"}, "Did you mean 'sign-finetune'?"),
        ({"--lower-set": "epoch=3"}, "Did you mean 'epochs'?"),
        ({"--lower-set": "epochs=0"}, "epochs must lie in"),
        ({"--baselines": "random,lowest"}, "Did you mean 'lowest-loss'?"),
        ({"--methods": "finetun"}, "Did you mean 'finetune'?"),
        ({"--set": "finetune.lr=0.1"}, "Unknown method among --methods 'finetune'"),
        ({"--methods": "finetune", "--set": "lr=0.1"}, "METHOD.KEY=VALUE"),
        ({"--methods": "finetune", "--set": "finetune.lrr=1"}, "Did you mean 'lr'?"),
        ({"--methods": "finetune", "--set": "finetune.lr=[1,2]", "--baselines": "lowest-loss"}, "keep the baseline"),
        ({"--model": "absent.safetensors"}, "Cannot read absent.safetensors"),
        ({"--model": "bare.safetensors"}, "say --epochs"),
        ({"--lr": "0.1"}, "--lr needs --epochs"),
        ({"--test": "0"}, "--no-evaluate"),
        ({"--data": "digit"}, "Did you mean 'digits'?"),
        ({"--out": "worst.safetensors"}, "must end in .json"),
        ({"--out": "other.json"}, "is no valid JSON"),
        ({"--out": "other.json", "--model": None}, "is no valid JSON"),
        ({"--device": "cuda:7"}, "device"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_any_work_and_nothing_is_written(run, weights, tmp_path, change, said):
    for name in ("model.safetensors", "bare.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    (tmp_path / "other.json").write_text("{")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = {
        "--data": "digits", "--arch": "mlp", "--arch-set": "width=32", "--model": "model.safetensors",
        "--size": "50", "--out": "worst.json", **change,
    }  # fmt: skip
    done = run("worst-case", *(word for pair in words.items() if pair[1] is not None for word in pair))
    assert done.exit_code == 2, done.output
    assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_model_kept_beside_the_result_is_used_again_and_never_mistaken_for_another(run, tmp_path):
    shared = ("worst-case", *TINY, "--size", "50", "--steps", "1", "--no-evaluate", "--out", "worst.json")
    assert run(*shared).exit_code == 0
    kept = (tmp_path / "worst.safetensors").stat().st_mtime_ns
    (tmp_path / "worst.json").unlink()
    assert run(*shared).exit_code == 0 and (tmp_path / "worst.safetensors").stat().st_mtime_ns == kept
    (tmp_path / "worst.json").unlink()
    other = run(*shared, "--seed", "1")
    assert other.exit_code == 2 and "holds another model" in other.stderr
