from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, ModelMismatch, NotTrained, UnknownName
from palimpsest.models import build_model
from palimpsest.retain import Run, Student, Training, build_learner, learn, parse_stream
from palimpsest.retain.finetuning import finetune
from palimpsest.retain.sensitivity import change, chosen, groups, measure_sensitivity, sensitive
from palimpsest.tasks.classification import Classification

TRAINING = Training(epochs=4, lr=0.1, batch_size=16)


@pytest.fixture(scope="module")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


@pytest.fixture
def resnet():
    return build_model("small_resnet", (1, 8, 8), 6, seed=0, width=4)


def test_every_parameter_is_in_one_group_and_norms_are_split(resnet):
    of_group = groups(resnet)
    parts = [part for names in of_group.values() for part in names]
    assert sorted(parts) == sorted(name for name, _ in resnet.named_parameters())
    assert of_group["head"] == ["head.weight", "head.bias"]
    assert of_group["stem.1.weight"] == ["stem.1.weight"] and of_group["stem.1.bias"] == ["stem.1.bias"]
    with_statistics = set(groups(resnet, statistics=True)) - set(of_group)
    assert {"stem.1.running_mean", "stem.1.running_var"} <= with_statistics
    assert not any("num_batches" in name for name in with_statistics)


def test_words_and_names_choose_modules(resnet):
    assert chosen(resnet, ["head"]) == ["head.weight", "head.bias"]
    assert chosen(resnet, ["first"]) == ["stem.0.weight"]
    norms = {name for name, module in resnet.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0] for name in chosen(resnet, ["norm"])} == norms
    assert len(chosen(resnet, ["all", "head"])) == len(list(resnet.parameters()))
    assert chosen(resnet, ["stem.1"]) == ["stem.1.weight", "stem.1.bias"]
    with pytest.raises(UnknownName, match="haed"):
        chosen(resnet, ["haed"])
    with pytest.raises(InvalidHyperparameter, match="no module"):
        chosen(build_model("mlp", (1, 8, 8), 6, seed=0), ["norm"])


def test_the_change_of_a_module_is_its_mean_absolute_difference():
    before = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([0.0, 1.0])}
    after = {"w": torch.tensor([[1.0, 0.0], [4.0, 4.0], [9.0, 9.0]]), "b": torch.tensor([0.0, -2.0, 5.0])}
    found = change(before, after, {"layer": ["w", "b"], "bias": ["b"]})
    assert found == {"layer": (2 + 1 + 3) / 6, "bias": 3 / 2}  # a head that grew: old rows only
    # size does not count: a large module that moved as far per number has the same change
    assert change({"w": torch.zeros(2)}, {"w": torch.ones(2)}, {"w": ["w"]}) == change(
        {"w": torch.zeros(200)}, {"w": torch.ones(200)}, {"w": ["w"]}
    )


def test_modules_above_a_share_of_the_largest_change_are_sensitive():
    scores = {"a": 1.0, "b": 0.4, "c": 0.41}
    assert sensitive(scores, 0.4) == ["a", "c"]
    assert sensitive(scores, 1.0) == ["a"]
    for threshold in (0.0, 1.5):
        with pytest.raises(InvalidHyperparameter, match="threshold"):
            sensitive(scores, threshold)


def test_the_report_is_what_snapshots_of_plain_descent_give(stream, small_mlp, cpu):
    training = Training(epochs=2, lr=0.1, batch_size=16)
    found = measure_sensitivity(stream, small_mlp(6), training=training, runtime=cpu(), tasks=2)
    run = Run(build_learner("finetune"), stream, small_mlp(6), training=training, runtime=cpu(), every=1)
    model, states = run.learner.student.model, []
    keep = run.evaluation.recorder.now
    run.evaluation.recorder.now = lambda *given: (
        states.append(copy.deepcopy(model.state_dict())) if given[1] % steps == 0 else None,
        keep(*given),
    )
    steps = 3  # 48 records per task
    run.advance()
    run.advance()
    states = states[1::2] if len(states) == 8 else states  # after a step, and again at the end of the epoch
    names = ["head.weight", "head.bias"]
    size = sum(states[0][name].numel() for name in names)

    def distance(a, b):
        return sum((states[a][name] - states[b][name]).abs().sum().item() for name in names) / size

    assert found.by_epoch[1][0]["head"] == pytest.approx(distance(2, 1), rel=1e-5)
    assert found.by_epoch[1][1]["head"] == pytest.approx(distance(3, 2), rel=1e-5)
    assert found.by_task[0][0]["head"] == pytest.approx(distance(2, 0), rel=1e-5)
    assert found.scores["head"] == found.by_epoch[1][0]["head"]
    assert json.loads(json.dumps(found.to_dict()))["sizes"]["head"] == size
    assert found.table().row_count == 3


def test_the_head_is_the_most_sensitive_module_of_a_plain_network(digits, cpu):
    stream = parse_stream("class:5x2", digits)
    model = build_model("mlp", (1, 8, 8), 10, seed=0, width=100)
    found = measure_sensitivity(stream, model, training=Training(2, 0.05, 16), runtime=cpu(), tasks=3)
    scores = found.scores
    assert scores.pop("head") > 2 * max(scores.values())
    assert found.selected(0.5) == ["head"]


def test_running_statistics_are_shown_but_never_selected(stream, resnet, cpu):
    found = measure_sensitivity(stream, resnet, training=Training(1, 0.1, 16), runtime=cpu(), tasks=2)
    assert "stem.1.running_mean" in found.scores
    assert not set(found.selected(0.01)) & found.statistics


@pytest.mark.parametrize("base", ["finetune", "er", "der++", "icarl", "gem", "view-batch", "joint"])
def test_only_chosen_modules_move_and_the_base_run_is_not_touched(base, stream, cpu):
    runs = []
    for name, settings in (
        (base, {}),
        ("fpf", {"base": base, "iterations": 5, "modules": ["head", "stem.1"]}),
    ):
        model = build_model("small_resnet", (1, 8, 8), 6, seed=0, width=4)
        training = Training(epochs=4 if base == "view-batch" else 1, lr=0.05, batch_size=16)
        run = Run(build_learner(name, settings), stream, model, training=training, runtime=cpu())
        run.advance()
        run.advance()
        runs.append(run.learner)
    plain, tuned = (dict(learner.student.model.named_parameters()) for learner in runs)
    moved = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert moved == {"head.weight", "head.bias", "stem.1.weight", "stem.1.bias"}
    assert not any(
        isinstance(module, nn.BatchNorm2d) and module.training for module in runs[1].student.model.modules()
    )


def test_batch_norm_statistics_follow_the_buffer_only_if_asked(stream, cpu):
    found = {}
    for statistics in (True, False):
        model = build_model("small_resnet", (1, 8, 8), 6, seed=0, width=4)
        outcome = learn("fpf", stream, model, training=Training(1, 0.05, 16), runtime=cpu(), iterations=3, statistics=statistics)  # fmt: skip
        plain = learn("finetune", stream, model, training=Training(1, 0.05, 16), runtime=cpu())
        found[statistics] = torch.equal(
            *(o.learner.student.model.state_dict()["stem.1.running_mean"] for o in (outcome, plain))
        )
    assert found == {True: False, False: True}


def test_tuning_the_head_brings_forgotten_classes_back(digits, cpu):
    stream = parse_stream("class:5x2", digits)
    accuracy = {}
    small = {"modules": ["head"], "memory": 100}
    for name, settings in (
        ("finetune", {}),
        ("fpf", small),
        ("k-fpf", {**small, "iterations": 50, "times": 1}),
    ):
        model = build_model("mlp", (1, 8, 8), 10, seed=0, width=100)
        outcome = learn(name, stream, model, training=TRAINING, runtime=cpu(), **settings)
        accuracy[name] = outcome.matrix.average
    assert accuracy["fpf"] > accuracy["finetune"] + 0.3
    assert accuracy["k-fpf"] > accuracy["finetune"] + 0.3


def test_it_finds_the_modules_by_itself(stream, small_mlp, cpu):
    outcome = learn(
        "fpf", stream, small_mlp(6), training=TRAINING, runtime=cpu(), modules="auto", threshold=0.6
    )
    assert outcome.learner.tuned() == ["head.weight", "head.bias"]
    assert outcome.measures()["head over others"] > 1
    assert len(outcome.learner.changes) == 2


def test_k_tunings_are_spread_over_the_steps(stream, small_mlp, cpu):
    run = Run(
        build_learner("k-fpf", {"times": 3, "iterations": 2, "modules": ["head"], "tuning_batch": 8}),
        stream, small_mlp(6), training=TRAINING, runtime=cpu(),
    )  # fmt: skip
    at, tune = [], run.learner._tune
    run.learner._tune = lambda: (at.append(run.learner.student.steps), tune())
    run.advance()
    run.advance()
    assert at == [4, 8, 12, 16, 20, 24]  # 3 steps per epoch, 4 epochs
    assert run.learner.figures["tuning records"] == 6 * 2 * 8
    assert run.learner.figures["tuning over replay"] == 96 / (2 * 4 * 48)


def test_tunings_every_so_many_steps_know_no_boundaries(stream, small_mlp, cpu):
    settings = {"every": 10, "iterations": 2, "modules": ["head"], "tuning_batch": 8}
    run = Run(build_learner("k-fpf", settings), stream, small_mlp(6), training=TRAINING, runtime=cpu())
    at, tune = [], run.learner._tune
    run.learner._tune = lambda: (at.append(run.learner.student.steps), tune())
    run.advance()
    run.advance()
    assert at == [10, 12, 20, 24]  # 12 and 24: for the answers after an experience


def test_distillation_takes_the_logits_of_the_buffer(stream, small_mlp, cpu):
    answers = {}
    for distil in (0.0, 50.0):
        outcome = learn("fpf", stream, small_mlp(6), training=TRAINING, runtime=cpu(), base="der", modules=["head"], distil=distil, tuning_lr=0.01)  # fmt: skip
        rows = outcome.learner.kept.all()
        logits = outcome.learner.student.model(rows["input"])
        answers[distil] = (logits.detach() - rows["logits"]).square().mean().item()
    assert answers[50.0] < 0.7 * answers[0.0]


def student_of(model, cpu, classes=6):
    student = Student(model, Classification(), cpu(), TRAINING, "class", classes)
    student.seen[:] = True
    return student


def test_bad_input_is_named(stream, small_mlp, cpu):
    student = student_of(small_mlp(6), cpu)
    rows = {"input": torch.zeros(4, 1, 8, 8), "label": torch.tensor([0, 1, 2, 9])}
    settings = {"iterations": 1, "lr": 0.1, "batch_size": 2, "random": torch.Generator()}
    with pytest.raises(NotTrained, match="empty"):
        finetune(student, {}, ["head.weight"], **settings)
    with pytest.raises(ModelMismatch, match="class 9"):
        finetune(student, rows, ["head.weight"], **settings)
    rows["label"] = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ModelMismatch, match="logits"):
        finetune(student, rows, ["head.weight"], distil=1.0, **settings)
    with pytest.raises(InvalidAudit, match="two tasks"):
        measure_sensitivity(stream, small_mlp(6), training=TRAINING, runtime=cpu(), tasks=1)
    for name, wrong in (("fpf", {"iterations": 0}), ("fpf", {"threshold": 0.0}), ("fpf", {"base": "fpf"}), ("k-fpf", {"times": 0}), ("k-fpf", {"every": 0}), ("fpf", {"distil": -1.0}), ("k-fpf", {"tuning_lr": 0.0})):  # fmt: skip
        with pytest.raises(InvalidHyperparameter):
            build_learner(name, wrong)
    with pytest.raises(InvalidHyperparameter, match="no module"):  # a plain network normalises nothing
        learn("fpf", stream, small_mlp(6), training=TRAINING, runtime=cpu(), modules="norm")
    for name in ("fpf", "k-fpf"):
        with pytest.raises(UnknownName, match="haed"):
            learn(name, stream, small_mlp(6), training=TRAINING, runtime=cpu(), modules=["haed"])
