"""What must hold for every learner that is registered, whoever wrote it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import MissingTaskId, ModelMismatch, NotTrained
from palimpsest.models import build_model
from palimpsest.retain import LEARNERS, Keeps, Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.evaluation import SECRET
from palimpsest.retain.state import load_state, save_state

TRAINING = Training(epochs=2, lr=0.05, batch_size=16)
SMALL = {"memory": 30, "size": 30, "vector_lr": 0.5, "pool": 12, "general": 2, "expert": 4, "tasks": 3}
"""Settings that many learners have, made small for these tests."""
PROMPTED = {name for name in LEARNERS.names() if Keeps.PRETRAINED in LEARNERS.get(name).card.keeps}
"""Learners that need a pretrained vision transformer."""
CHAINS = {"sharp"}
"""Learners that rewire the network: they need a chain of layers without batch norm."""


def made(name, scenario="class"):
    fields = LEARNERS.get(name).__dataclass_fields__
    return build_learner(name, {key: value for key, value in SMALL.items() if key in fields}, scenario)


def each(scenario):
    names = [name for name in LEARNERS.names() if scenario in LEARNERS.get(name).card.scenarios]
    return pytest.mark.parametrize("name", names)


def run_of(name, stream, small_network, cpu, every=0, training=TRAINING):
    model = small_network(name, stream.classes)
    return Run(
        made(name, stream.scenario), stream, model, training=training, runtime=cpu(), every=every, subset=20
    )


def finished(run):
    while not run.finished:
        run.advance()
    return run


@pytest.fixture(scope="session")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


@each("class")
def test_it_learns_the_first_task_and_ends_with_a_matrix(name, stream, small_network, cpu):
    outcome = finished(run_of(name, stream, small_network, cpu, training=Training(8, 0.1, 8))).outcome()
    assert outcome.matrix.scores.shape == (3, 3)
    assert outcome.matrix.scores[0, 0] > 0.6
    assert np.isnan(outcome.matrix.scores[np.triu_indices(3, 1)]).all()
    assert outcome.measures()["FWT"] is None


@each("class")
def test_it_goes_on_after_a_stop_to_the_same_bits(name, stream, small_network, cpu, weights, tmp_path):
    whole = finished(run_of(name, stream, small_network, cpu, every=3))
    for stop in (1, 2):
        first = run_of(name, stream, small_network, cpu, every=3)
        for _ in range(stop):
            first.advance()
        save_state(first.state_dict(), tmp_path / "state")
        torch.rand(stop)  # another process has another random state
        second = run_of(name, stream, small_network, cpu, every=3)
        second.load_state_dict(load_state(tmp_path / "state"))
        finished(second)
        assert torch.equal(weights(whole.learner), weights(second.learner))
        np.testing.assert_array_equal(whole.outcome().matrix.scores, second.outcome().matrix.scores)
        assert whole.outcome().history == second.outcome().history


@each("class")
def test_evaluation_while_learning_changes_nothing(name, stream, small_network, cpu, weights):
    plain, audited = (finished(run_of(name, stream, small_network, cpu, every=every)) for every in (0, 1))
    assert torch.equal(weights(plain.learner), weights(audited.learner))
    assert len(audited.outcome().history.learning) >= audited.learner.student.steps


@each("class")
def test_it_never_sees_labels_ids_or_task_ids_at_test_time(name, stream, small_network, cpu):
    run = run_of(name, stream, small_network, cpu, every=5)
    seen, predict = [], run.learner.predict

    def spy(batch):
        seen.append(set(batch))
        return predict(batch)

    run.learner.predict = spy
    finished(run)
    assert seen and not any(keys & set(SECRET) for keys in seen)


@each("class")
def test_a_false_task_id_does_not_change_its_answers(name, stream, small_network, cpu):
    run = finished(run_of(name, stream, small_network, cpu))
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    answers = run.learner.predict({"input": inputs})
    for task in range(3):
        told = run.learner.predict({"input": inputs, "task": torch.full((len(inputs),), task)})
        assert torch.equal(answers, told)


@each("class")
def test_an_answer_does_not_depend_on_the_company_of_a_record(name, stream, small_network, cpu):
    run = finished(run_of(name, stream, small_network, cpu))
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    together = run.learner.predict({"input": inputs})
    alone = torch.cat([run.learner.predict({"input": row[None]}) for row in inputs])
    assert (together == alone).float().mean() > 0.95  # a tie may fall either way in another batch size


@each("class")
def test_the_model_that_is_given_stays_as_it_was(name, stream, small_network, cpu):
    model = small_network(name, stream.classes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    learn(made(name), stream, model, training=TRAINING, runtime=cpu())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@each("class")
def test_only_classes_that_were_met_are_answered(name, stream, small_network, cpu):
    run = run_of(name, stream, small_network, cpu)
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    for met in (2, 4, 6):
        run.advance()
        assert int(run.learner.predict({"input": inputs}).max()) < met


@each("class")
def test_it_cannot_be_asked_before_it_has_learned(name, stream, small_network, cpu):
    with pytest.raises(NotTrained):
        made(name).predict({"input": torch.zeros(1, 1, 8, 8)})
    run = run_of(name, stream, small_network, cpu)
    with pytest.raises(NotTrained):
        run.learner.predict({"input": torch.zeros(1, 1, 8, 8)})


@each("class")
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name, stream, small_network, cpu, weights):
    first, again, other = (
        learn(made(name), stream, small_network(name, 6), training=TRAINING, runtime=cpu(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(weights(first.learner), weights(again.learner))
    assert not torch.equal(weights(first.learner), weights(other.learner))


@each("class")
def test_a_growing_head_and_batch_norm_work(name, few_digits, cpu, tiny_vit):
    stream = parse_stream("class:3x2", few_digits)
    model = build_model("small_resnet", (1, 8, 8), 6, seed=0, width=4)
    training = Training(epochs=1, lr=0.05, batch_size=16, head="growing")
    if name in PROMPTED:
        with pytest.raises(ModelMismatch, match="vision transformer"):
            Run(made(name), stream, model, training=training, runtime=cpu())
        model = tiny_vit(6)
    if name in CHAINS:
        with pytest.raises(ModelMismatch, match=r"chain|plain convolutions"):
            Run(made(name), stream, model, training=training, runtime=cpu())
        model = build_model("small_cnn", (1, 8, 8), 6, seed=0, width=4, hidden=16)
    run = Run(made(name), stream, model, training=training, runtime=cpu())
    for outputs in (2, 4, 6):
        run.advance()
        assert run.learner.student.outputs == outputs
    assert all(torch.isfinite(value).all() for value in run.learner.student.model.state_dict().values())


@each("task")
def test_with_a_task_id_only_classes_of_the_task_are_answered(name, few_digits, small_network, cpu):
    stream = parse_stream("task:3x2", few_digits)
    run = finished(run_of(name, stream, small_network, cpu))
    for experience in stream:
        batch = {"input": few_digits.tensors["input"][:40], "task": torch.full((40,), experience.task)}
        assert set(run.learner.predict(batch).tolist()) <= set(experience.classes)
    with pytest.raises(MissingTaskId, match="task ids"):
        run.learner.predict({"input": few_digits.tensors["input"]})
    with pytest.raises(MissingTaskId, match="Tasks 0 to 2"):
        run.learner.predict({"input": few_digits.tensors["input"][:1], "task": torch.tensor([3])})


@each("domain")
def test_it_learns_a_domain_incremental_stream(name, few_digits, small_network, cpu):
    # a frozen encoder knows no permuted pixels
    stream = parse_stream("domain:rotated:0,40" if name in PROMPTED else "domain:permuted:2", few_digits)
    training = Training(8, 0.02, 8, optimizer="adam") if name in PROMPTED else Training(6, 0.1, 8)
    outcome = finished(run_of(name, stream, small_network, cpu, training=training)).outcome()
    assert np.isfinite(outcome.matrix.scores).all()
    assert outcome.matrix.scores[0, 0] > 0.5
    assert outcome.measures()["FWT"] is not None
