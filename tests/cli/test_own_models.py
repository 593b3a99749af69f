"""`forget` and `audit` on saved models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import palimpsest as pal
from palimpsest.models import build_model
from palimpsest.parts.checkpoint import read_checkpoint

SHARED = ("--arch", "mlp", "--arch-set", "width=32", "--data", "digits", "--forget", "label=3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory, class_request, digits_task):
    """A small network trained on the digits, with and without its recipe in the file."""
    folder = tmp_path_factory.mktemp("weights")
    network = build_model("mlp", (1, 8, 8), 10, seed=0, width=32)
    model = pal.train(network, class_request.train, task=digits_task, epochs=8, seed=0, lr=3e-3)
    pal.save_model(model, folder / "model.safetensors")
    network.load_state_dict(model.state_dict())
    pal.save_model(network, folder / "bare.safetensors")
    return folder


def _accuracy(path, records, task):
    model = pal.load_model(path, build_model("mlp", (1, 8, 8), 10, width=32))
    batch = records.batch(np.arange(len(records)), task.collate)
    return (task.logits(model, batch).argmax(1) == batch["label"]).float().mean().item()


def test_forget_then_audit_tells_the_story_of_a_forgotten_class(run, weights, class_request, digits_task):
    model = weights / "model.safetensors"
    before = model.read_bytes()
    forgot = run("forget", "--model", model, *SHARED, "--method", "neggrad-plus", "--out", "forgot.safetensors",
                 "--seed", "1", "--json")  # fmt: skip
    assert forgot.exit_code == 0, forgot.output
    said = json.loads(forgot.stdout)
    assert said["method"] == "neggrad-plus" and said["request"] == "label = 3"
    assert said["records"]["forget"] == len(class_request.forget)
    assert said["sha256"] == read_checkpoint("forgot.safetensors").sha256
    assert read_checkpoint("forgot.safetensors").notes["method"] == "neggrad-plus"
    assert model.read_bytes() == before
    assert _accuracy(model, class_request.forget, digits_task) > 0.9
    assert _accuracy("forgot.safetensors", class_request.forget, digits_task) < 0.3
    for seed in (1, 2):
        done = run("forget", "--model", model, *SHARED, "--method", "retrain", "--seed", seed,
                   "--out", f"retrained-{seed}.safetensors")  # fmt: skip
        assert done.exit_code == 0, done.output
        assert _accuracy(f"retrained-{seed}.safetensors", class_request.forget, digits_task) == 0
    models = ("--original", model, "--retrained", "retrained-1.safetensors")
    more = ("--retrained", "retrained-2.safetensors", "--audits", "utility")
    shown = run("audit", *models, *more, "--unlearned", "forgot.safetensors", *SHARED, "--out", "report.csv")
    assert shown.exit_code == 0, shown.output
    assert "verdict: " in shown.stdout and "utility.forget_accuracy" in shown.stdout
    untouched = run("audit", *models, *more, "--unlearned", model, *SHARED, "--json", "--out", "report.json")
    report = json.loads(untouched.stdout)
    assert report["verdict"] == "intact" and report["facts"]["controls"] == 2
    assert json.loads(Path("report.json").read_text())["verdict"] == "intact"
    page = run("audit", *models, "--unlearned", "forgot.safetensors", *SHARED, "--audits", "utility",
               "--out", "report.html")  # fmt: skip
    assert page.exit_code == 0 and Path("report.html").read_text().lstrip().lower().startswith(
        "<!doctype html>"
    )


def test_two_models_give_a_comparison_without_a_verdict(run, weights):
    model = weights / "model.safetensors"
    done = run("audit", "--original", model, "--unlearned", model, *SHARED, "--audits", "utility", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["verdict"] == "inconclusive"
    assert report["findings"][0]["value"] == report["findings"][0]["original"]


def test_a_model_alone_cannot_be_audited(run, weights):
    done = run("audit", "--unlearned", weights / "model.safetensors", *SHARED)
    assert done.exit_code == 2 and "Nothing to compare with" in done.stderr


def test_retraining_needs_a_recipe_from_the_file_or_the_command_line(run, weights):
    shared = ("forget", "--model", weights / "bare.safetensors", *SHARED, "--out", "new.safetensors")
    missing = run(*shared, "--method", "retrain")
    assert missing.exit_code == 2 and "say --epochs" in missing.stderr
    assert run(*shared, "--method", "retrain", "--epochs", "1", "--lr", "0.01").exit_code == 0
    assert read_checkpoint("new.safetensors").weights
    wrong = run(*shared, "--method", "finetune", "--epochs", "1")
    assert wrong.exit_code == 2 and "--set" in wrong.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--method": "ssdd"}, "Did you mean 'ssd'?"),
        ({"--set": "alpa=3"}, "Did you mean 'alpha'?"),
        ({"--set": "alpha"}, "written key=value"),
        ({"--set": "alpha=-1"}, "alpha must lie in"),
        ({"--arch": "mpl"}, "Did you mean 'mlp'?"),
        ({"--arch-set": "width=16"}, "do not fit the MLP"),
        ({"--arch-set": "breadth=16"}, "breadth"),
        ({"--classes": "9"}, "other shapes"),
        ({"--model": "absent.safetensors"}, "Cannot read absent.safetensors"),
        ({"--model": "cut.safetensors"}, "cut short"),
        ({"--model": "model.pt"}, "is a pickle"),
        ({"--model": "nan.safetensors"}, "NaN"),
        ({"--forget": "label=11"}, "No record has label"),
        ({"--forget": "label=0,1,2,3,4,5,6,7,8,9"}, "nothing is left to retain"),
        ({"--test": "0.6", "--holdout": "0.5"}, "must be below 1"),
        ({"--device": "cuda:7"}, "device"),
        ({"--out": "model.safetensors", "--model": "./model.safetensors"}, "never overwritten"),
    ],
)  # fmt: skip
def test_bad_input_to_forget_is_named_and_nothing_is_written(run, weights, tmp_path, change, said):
    whole = (weights / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "model.pt")
    network = build_model("mlp", (1, 8, 8), 10, width=32)
    torch.nn.init.constant_(network.head.bias, float("nan"))
    pal.save_model(network, tmp_path / "nan.safetensors")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = {
        "--model": "model.safetensors", "--arch": "mlp", "--arch-set": "width=32", "--data": "digits",
        "--forget": "label=3", "--method": "ssd", "--out": "new.safetensors", **change,
    }  # fmt: skip
    done = run("forget", *(word for pair in words.items() for word in pair))
    assert done.exit_code == 2, done.output
    assert said in done.stderr and "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_test_and_holdout_can_be_named_by_a_rule(run, weights, tmp_path, digits):
    images = np.stack([digits[i]["input"].numpy() for i in range(600)])
    labels = digits.column("label")[:600]
    part = np.array(["train"] * 400 + ["test"] * 100 + ["holdout"] * 100)
    np.savez(tmp_path / "own.npz", x=images, y=labels, part=part)
    done = run("forget", "--model", weights / "model.safetensors", "--arch", "mlp", "--arch-set", "width=32",
               "--data", "arrays:own.npz", "--forget", "label=3", "--test", "part=test", "--holdout", "part=holdout",
               "--method", "finetune", "--set", "epochs=1", "--out", "new.safetensors", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    sizes = json.loads(done.stdout)["records"]
    assert sizes["test"] == 100 and sizes["holdout"] == 100
    assert sizes["forget"] == int((labels[:400] == 3).sum()) and sizes["forget"] + sizes["retain"] == 400
