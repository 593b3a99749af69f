"""Rehearsal-free learning against closed forms and by hand; what it must leave alone; what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palimpsest.core.errors import (
    InvalidAudit,
    InvalidHyperparameter,
    InvalidRecords,
    InvalidStream,
    ModelMismatch,
    NotTrained,
)
from palimpsest.core.matrix import ScoreMatrix
from palimpsest.models import build_model
from palimpsest.parts.attention import query_key_value
from palimpsest.retain import Run, Student, Training, build_learner, parse_stream
from palimpsest.retain.fisher import diagonal_fisher
from palimpsest.retain.following import follow
from palimpsest.retain.methods.lwf import distillation
from palimpsest.retain.methods.lwf_mc import sigmoid_loss
from palimpsest.retain.metrics import forgetting_by_steps, global_forgetting, local_forgetting
from palimpsest.retain.state import load_state, save_state
from palimpsest.tasks.classification import Classification

TRAINING = Training(epochs=2, lr=0.05, batch_size=16)
ALL = {"features": 0.1, "ewc": 5.0, "l2": 0.1}


@pytest.fixture(scope="session")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


@pytest.fixture
def vit():
    return build_model("small_vit", (1, 8, 8), 6, width=16, layers=2, heads=2, patch=4)


def run_of(stream, model, runtime, training=TRAINING, **settings):
    return Run(
        build_learner("rehearsal-free", settings, "class"), stream, model, training=training, runtime=runtime
    )


def finished(run):
    while not run.finished:
        run.advance()
    return run


def parameters(run):
    return {name: value.detach().clone() for name, value in run.learner.student.model.named_parameters()}


@pytest.mark.parametrize("head", ["full", "growing"])
@pytest.mark.parametrize(
    "settings",
    [ALL, {**ALL, "classifier": "softmax", "online": False, "fisher": "per-sample", "labels": "true"}],
)
def test_a_run_goes_on_after_a_stop_to_the_same_bits(
    stream, small_mlp, cpu, weights, tmp_path, settings, head
):
    training = replace(TRAINING, head=head)
    whole = finished(run_of(stream, small_mlp(6), cpu(), training, **settings))
    for stop in (1, 2):
        first = run_of(stream, small_mlp(6), cpu(), training, **settings)
        for _ in range(stop):
            first.advance()
        save_state(first.state_dict(), tmp_path / "state")
        second = run_of(stream, small_mlp(6), cpu(), training, **settings)
        second.load_state_dict(load_state(tmp_path / "state"))
        assert torch.equal(weights(whole.learner), weights(finished(second).learner))


def test_with_nothing_else_it_is_lwf_mc(stream, small_mlp, cpu, weights):
    ours = finished(run_of(stream, small_mlp(6), cpu()))
    other = Run(build_learner("lwf-mc"), stream, small_mlp(6), training=TRAINING, runtime=cpu())
    assert torch.equal(weights(ours.learner), weights(finished(other).learner))


def test_terms_of_past_classes_carry_the_weight():
    logits, old = torch.randn(4, 5), torch.randn(4, 5)
    labels, past = torch.tensor([3, 4, 3, 4]), torch.arange(5) < 3
    met = torch.ones(5, dtype=torch.bool)
    by_hand = F.binary_cross_entropy_with_logits(
        logits[:, 3:], F.one_hot(labels - 3, 2).float(), reduction="sum"
    )
    by_hand = by_hand + 0.3 * F.binary_cross_entropy_with_logits(
        logits[:, :3], old[:, :3].sigmoid(), reduction="sum"
    )
    assert torch.allclose(sigmoid_loss(logits, labels, old, past, met, 0.3), by_hand / 4)


@pytest.mark.parametrize("loss", [sigmoid_loss, distillation])
def test_an_old_network_with_other_outputs_is_refused(loss):
    past = torch.tensor([True, True, False])
    with pytest.raises(ModelMismatch, match="same classes"):
        if loss is distillation:
            loss(torch.randn(2, 3), torch.randn(2, 2), past)
        else:
            loss(torch.randn(2, 3), torch.tensor([2, 2]), torch.randn(2, 2), past, torch.ones_like(past))


def test_the_penalty_pulls_to_the_previous_network_and_leaves_rows_of_new_classes_alone(
    stream, small_mlp, cpu
):
    run = run_of(stream, small_mlp(6), cpu(), l2=2.0)
    run.advance()
    before = parameters(run)
    attractors = run.learner._attractors(run.learner.student.seen.clone())
    ((strength, importance, anchor),) = attractors
    assert strength == 2.0
    for name, value in before.items():
        assert torch.equal(anchor[name], value), name
        expected = torch.ones_like(value)
        if name.startswith("head."):
            expected[2:] = 0
        assert torch.equal(importance[name], expected), name


def test_l2_works_in_the_first_experience_only_towards_pretrained_weights(stream, small_mlp, cpu):
    start = small_mlp(6)

    def gap(**settings):
        run = run_of(stream, start, cpu(), **settings)
        run.advance()
        after = parameters(run)
        return sum(
            float((after[name] - value.detach()).square().sum())
            for name, value in start.named_parameters()
            if not name.startswith("head")
        )

    free = gap()
    assert gap(l2=5.0) == gap(l2=5.0, pretrained=False) == free
    assert gap(l2=5.0, pretrained=True) < 0.5 * free


def test_stronger_terms_keep_the_network_nearer_to_the_old_one(stream, small_mlp, cpu):
    def gap(**settings):
        run = run_of(stream, small_mlp(6), cpu(), **settings)
        run.advance()
        before = parameters(run)
        run.advance()
        after = parameters(run)
        return sum(float((after[n] - before[n]).square().sum()) for n in before if not n.startswith("head"))

    plain = gap()
    for settings in ({"l2": 1.0}, {"ewc": 100.0}, {"features": 1.0}):
        assert gap(**settings) < plain, settings


def test_only_projections_and_head_of_a_vision_transformer_move(stream, vit, cpu):
    run = finished(run_of(stream, vit, cpu(), trained="attention", l2=0.1, ewc=1.0))
    free = set(query_key_value(vit)) | {"head.weight", "head.bias"}
    assert len(free) == 2 * 2 * 3 + 2
    start = dict(vit.named_parameters())
    for name, value in parameters(run).items():
        assert torch.equal(value, start[name]) == (name not in free), name
    assert all(parameter.requires_grad for parameter in vit.parameters()), "the given network is not changed"


def test_projections_are_found_in_networks_of_other_libraries():
    assert query_key_value(nn.TransformerEncoderLayer(4, 2)) == [
        "self_attn.in_proj_weight",
        "self_attn.in_proj_bias",
    ]
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, num_classes=3)
    assert query_key_value(model) == [
        f"blocks.{block}.attn.qkv.{kind}" for block in range(2) for kind in ("weight", "bias")
    ]


def test_classes_not_met_have_no_fisher_information(small_mlp, few_digits, cpu):
    model, task = small_mlp(6), Classification()
    met = torch.tensor([True, True, True, False, False, False])
    records = few_digits.select(np.flatnonzero(few_digits.column("label") < 3))
    found = diagonal_fisher(model, cpu().batches(records, task, 8), task, "true", "batch-mean", met)
    assert (found["head.weight"][3:] == 0).all() and (found["head.weight"][:3] > 0).any()


def test_batches_of_one_are_the_mean_over_records(small_mlp, few_digits, cpu):
    model, task, records = small_mlp(6), Classification(), few_digits.select(np.arange(0, 60, 7))
    one = diagonal_fisher(model, cpu().batches(records, task, 1), task)
    single = diagonal_fisher(model, cpu().batches(records, task, 4), task, averaging="per-sample")
    for name, value in one.items():
        assert torch.allclose(value, single[name], rtol=1e-4, atol=1e-9), name


def test_forgetting_by_hand():
    scores = np.array([[0.9, np.nan, np.nan], [0.7, 0.8, np.nan], [0.4, 0.5, 0.6]])
    matrix = ScoreMatrix(scores)
    # i = 2: 2/4 * 0.2; i = 3: 2/6 * 0.5 + 2/6 * 0.3
    assert np.isclose(global_forgetting(matrix, (2, 2, 2)), (0.1 + 0.8 / 3) / 2)
    # sizes 1, 3, 2: i = 2: 1/4 * 0.2; i = 3: 1/6 * 0.5 + 3/6 * 0.3
    assert np.isclose(global_forgetting(matrix, (1, 3, 2)), (0.05 + 0.5 / 6 + 0.15) / 2)
    assert np.isclose(local_forgetting(matrix), (0.5 + 0.3) / 2)
    assert np.isclose(forgetting_by_steps(matrix), (0.2 + (0.3 + 0.3) / 2) / 2)
    with pytest.raises(InvalidAudit, match="3 tasks"):
        global_forgetting(matrix, (2, 2))


def test_fewer_classes_to_choose_from_never_hurt_and_own_classes_are_easiest(stream, small_mlp, cpu):
    followed = follow(run_of(stream, small_mlp(6), cpu()))
    plain, earlier, own = (m.scores for m in (followed.plain, followed.among_earlier, followed.among_own))
    lower = np.tril_indices(3)
    assert (earlier[lower] >= plain[lower] - 1e-9).all() and (own[lower] >= earlier[lower] - 1e-9).all()
    assert np.allclose(earlier[:, 0], own[:, 0]), "the first task has no earlier classes"
    assert np.allclose(earlier.diagonal(), plain.diagonal()), "after its own step a task has no later classes"
    assert list(followed.similarity) == ["hidden.0", "hidden.1"]
    assert set(followed.figures()) >= {"global forgetting", "local forgetting", "CKA of the last layer"}
    begun = run_of(stream, small_mlp(6), cpu())
    begun.advance()
    with pytest.raises(InvalidStream, match="beginning"):
        follow(begun)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"l2": -0.1}, "l2"),
        ({"ewc": float("inf")}, "ewc"),
        ({"features": -1.0}, "features"),
        ({"temperature": 0.0}, "temperature"),
        ({"classifier": "hinge"}, "classifier"),
        ({"trained": "head"}, "trained"),
        ({"among": "new"}, "softmax"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(InvalidHyperparameter, match=words):
        build_learner("rehearsal-free", settings)


def test_bad_input_is_refused(stream, small_mlp, cpu, few_digits):
    with pytest.raises(ModelMismatch, match="small_vit"):
        run_of(stream, small_mlp(6), cpu(), trained="attention")
    fresh = run_of(stream, small_mlp(6), cpu())
    with pytest.raises(NotTrained, match="experience before"):
        fresh.learner.observe(stream[1])
    run = run_of(stream, small_mlp(6), cpu(), ewc=1.0)
    run.advance()
    with pytest.raises(InvalidStream, match="comes back"):
        run.learner.observe(replace(stream[1], classes=(1, 2)))
    run.learner.anchors = []
    with pytest.raises(NotTrained, match="finished experience"):
        run.learner.observe(stream[1])
    with pytest.raises(InvalidRecords, match="at least one"):
        diagonal_fisher(small_mlp(6), [], Classification())


def test_a_student_of_a_task_incremental_stream_learns_too(few_digits, small_mlp, cpu):
    told = parse_stream("task:3x2", few_digits)
    run = Run(
        build_learner("rehearsal-free", ALL, "task"), told, small_mlp(6), training=TRAINING, runtime=cpu()
    )
    assert isinstance(finished(run).learner.student, Student)
    assert run.outcome().matrix.average > 0.55
