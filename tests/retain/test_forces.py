"""Plasticity and stability against gradients taken apart by hand; what must be 0, and what must not change."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from palimpsest.retain import Run, Training, build_learner, parse_stream
from palimpsest.retain.methods.er import replay_loss, replayed_part
from palimpsest.retain.state import load_state, save_state

TRAINING = Training(epochs=2, lr=0.05, batch_size=16)
SAYING = {
    "er": {"memory": 30, "fill": "end", "buffer": "balanced"},
    "er-ace": {"memory": 30},
    "der": {"memory": 30},
    "der++": {"memory": 30},
    "ewc": {},
    "lwf": {},
    "gem": {"memory": 30},
    "a-gem": {"memory": 30},
}
"""Learners that say which part of their gradient holds on."""


@pytest.fixture(scope="session")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


@pytest.fixture
def run_of(stream, small_mlp, cpu):
    def made(name, gradients=True, **settings):
        learner = build_learner(name, {**SAYING.get(name, {}), **settings}, "class")
        return Run(learner, stream, small_mlp(6), training=TRAINING, runtime=cpu(), gradients=gradients)

    return made


def finished(run):
    while not run.finished:
        run.advance()
    return run


@pytest.mark.parametrize("name", SAYING)
def test_noting_them_changes_no_bit_and_both_parts_are_there_in_later_tasks(name, run_of, weights):
    noted, plain = finished(run_of(name)), finished(run_of(name, gradients=False))
    assert torch.equal(weights(noted.learner), weights(plain.learner))
    assert plain.outcome().gradients == {}
    found = noted.outcome().to_dict()["gradients"]
    assert {1, 2} <= set(found["learning"]) and found["steps"] == sorted(found["steps"])
    assert min(found["plasticity"]) > 0 and max(found["stability"]) > 0
    assert all(value is None or -1.0001 <= value <= 1.0001 for value in found["cosine"])


@pytest.mark.parametrize("name", ["finetune", "si"])
def test_learners_that_say_nothing_leave_no_row(name, run_of):
    assert finished(run_of(name)).outcome().gradients["steps"] == []


def test_the_parts_are_those_of_the_loss(run_of, few_digits):
    run = run_of("er", weight=0.3)
    student = run.learner.student
    inputs, labels = few_digits.tensors["input"][:12], few_digits.tensors["label"][:12]
    model = student.model

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    new = gradient(0.3 * F.cross_entropy(model(inputs[:8]), labels[:8]))
    held = gradient(0.7 * F.cross_entropy(model(inputs[8:]), labels[8:]))
    with student.learning(run.stream[0]):
        logits = model(inputs)
        student.step(replay_loss(logits, labels, 8, 0.3), lambda: replayed_part(logits, labels, 8, 0.3))
    ((_, _, plasticity, stability, cosine),) = student.forces.rows
    assert plasticity == pytest.approx(float(new.norm()), rel=1e-4)
    assert stability == pytest.approx(float(held.norm()), rel=1e-4)
    assert cosine == pytest.approx(float(F.cosine_similarity(new, held, dim=0)), abs=1e-4)


@pytest.mark.parametrize("weight", [None, 0.3])
def test_new_and_replayed_part_add_up_to_the_loss(weight):
    logits, labels = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 4
    share = 0.6 if weight is None else weight
    new = share * F.cross_entropy(logits[:6], labels[:6])
    whole = replay_loss(logits, labels, 6, weight)
    torch.testing.assert_close(new + replayed_part(logits, labels, 6, weight), whole)
    assert replayed_part(logits, labels, 10, weight) is None


def test_penalties_and_distillation_pull_at_nothing_when_a_task_begins(run_of):
    for name, most in (("ewc", 0.0), ("lwf", 1e-5)):
        found = finished(run_of(name)).outcome().gradients
        for task in (1, 2):
            rows = np.flatnonzero(np.asarray(found["learning"]) == task)
            assert found["stability"][rows[0]] <= most < found["stability"][rows[-1]], name
            assert most > 0 or found["cosine"][rows[0]] is None


def test_what_a_projection_adds_is_as_long_as_the_part_that_it_takes_away(run_of):
    found = finished(run_of("a-gem")).outcome().gradients
    new, held, cosine = (np.asarray(found[name]) for name in ("plasticity", "stability", "cosine"))
    assert len(held) and (held > 0).all()
    # g - (g.r / r.r) r adds a vector along -r of the length of g's part along r
    np.testing.assert_allclose(held, -cosine * new, rtol=1e-3)


def test_they_are_kept_where_a_run_goes_on(run_of, tmp_path):
    whole = finished(run_of("er"))
    first = run_of("er")
    first.advance()
    first.advance()
    save_state(first.state_dict(), tmp_path / "state")
    second = run_of("er")
    second.load_state_dict(load_state(tmp_path / "state"))
    assert finished(second).outcome().gradients == whole.outcome().gradients
