from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingTaskId, ModelMismatch
from palimpsest.core.runtime import Runtime
from palimpsest.models import build_model
from palimpsest.retain import LEARNERS, Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.contrast import supervised_contrast
from palimpsest.retain.methods.prd import prototype_loss, relation_distillation

SMALL = {"hidden": 16, "projected": 8}
TRAINING = Training(epochs=2, lr=0.05, batch_size=16, augmentation="noise")


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(11)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(6, 3), make(5, 3), make(6, 3), make(5, 3)


@pytest.fixture(scope="module")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


def run_of(stream, model, cpu, training=TRAINING, **settings):
    return Run(build_learner("prd", {**SMALL, **settings}), stream, model, training=training, runtime=cpu())


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


def divergence(old, new):
    return (old * np.log(old / new)).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_by_classes_each_record_keeps_its_softmax_over_the_classes_of_each_experience(drawn, temperature):
    h, p, old_h, old_p = (part.numpy() for part in drawn)
    expected = 0.0
    for classes in ([0, 3], [1, 4, 2]):
        for i in range(6):
            new, old = (
                softmax(np.array([f[i] @ v[c] / np.linalg.norm(v[c]) for c in classes]) / temperature)
                for f, v in ((h, p), (old_h, old_p))
            )
            expected += divergence(old, new) / 6
    found = relation_distillation(*drawn, [[0, 3], [1, 4, 2]], temperature, "class")
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_by_samples_each_old_class_keeps_its_softmax_over_the_records(drawn):
    h, p, old_h, old_p = (part.numpy() for part in drawn)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    expected = sum(
        divergence(
            softmax(np.array([cosine(f, old_p[c]) for f in old_h]) / 0.1),
            softmax(np.array([cosine(f, p[c]) for f in h]) / 0.1),
        )
        for c in (0, 3, 1)
    )
    found = relation_distillation(*drawn, [[0, 3], [1]], 0.1, "sample")
    assert found.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("axis", ["class", "sample"])
def test_distillation_and_its_gradient_are_zero_right_after_the_copy(drawn, axis):
    h, p = (part.clone().requires_grad_() for part in drawn[:2])
    loss = relation_distillation(h, p, drawn[0], drawn[1], [[0, 1], [2, 3]], 0.3, axis)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert h.grad.abs().max() < 1e-12 and p.grad.abs().max() < 1e-12


@pytest.mark.parametrize("axis", ["class", "sample"])
def test_distillation_moves_encoder_and_old_prototypes_and_not_the_old_network(drawn, axis):
    h, p, old_h, old_p = (part.clone().requires_grad_() for part in drawn)
    relation_distillation(h, p, old_h, old_p, [[0, 1], [2]], 0.3, axis).backward()
    assert h.grad.abs().sum() > 0
    moved = p.grad.abs().sum(1) > 0
    assert moved.tolist() == [
        True,
        True,
        axis == "sample",
        False,
        False,
    ]  # a softmax over one class says nothing
    assert old_h.grad is None and old_p.grad is None


def test_without_earlier_experiences_there_is_nothing_to_distil(drawn):
    assert relation_distillation(*drawn, []).item() == 0.0


def test_the_prototype_loss_pulls_only_classes_of_the_batch_and_no_feature(drawn):
    h, p = (part.clone().requires_grad_() for part in drawn[:2])
    labels = torch.tensor([1, 1, 3, 3, 1, 3])
    loss = prototype_loss(h, p, labels)
    loss.backward()
    cosine = [
        h[i].detach() @ p[y].detach() / h[i].detach().norm() / p[y].detach().norm()
        for i, y in enumerate(labels)
    ]
    assert loss.item() == pytest.approx(1 - float(torch.stack(cosine).mean()))
    assert h.grad is None
    assert torch.equal(p.grad[[0, 2, 4]], torch.zeros(3, 3, dtype=torch.float64))
    assert (p.grad[[1, 3]].abs().sum(1) > 0).all()


def test_a_batch_of_one_has_a_prototype_loss(drawn):
    assert 0 <= prototype_loss(drawn[0][:1], drawn[1], torch.tensor([2])).item() <= 2


def test_the_contrast_is_that_of_its_definition():
    z = nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double(), dim=1)
    labels, rows, losses = [0, 1, 0, 0, 1, 0], z.numpy(), []
    for i in range(6):
        others = [k for k in range(6) if k != i]
        total = np.log(sum(np.exp(rows[i] @ rows[k] / 0.1) for k in others))
        losses.append(-np.mean([rows[i] @ rows[k] / 0.1 - total for k in others if labels[k] == labels[i]]))
    found = supervised_contrast(z, torch.tensor(labels), 0.1, 0.07)
    assert found.item() == pytest.approx(np.mean(losses) * 0.1 / 0.07, abs=1e-9)


def head_after_each(run):
    heads = [run.learner.student.model.head.weight.detach().clone()]
    while not run.finished:
        run.advance()
        heads.append(run.learner.student.model.head.weight.detach().clone())
    return heads


@pytest.mark.parametrize("axis", ["class", "sample"])
def test_old_prototypes_move_with_distillation_and_unmet_ones_do_not(stream, small_mlp, cpu, axis):
    heads = head_after_each(run_of(stream, small_mlp(6), cpu, axis=axis))
    for step in range(3):
        moved = (heads[step + 1] != heads[step]).any(1)
        assert moved.tolist() == [True] * (2 * step + 2) + [False] * (4 - 2 * step)


def test_old_prototypes_stay_to_the_bit_without_distillation_whatever_the_optimiser(stream, small_mlp, cpu):
    for training in (
        Training(2, 0.05, 16, momentum=0.9, weight_decay=0.1, augmentation="noise"),
        Training(2, 0.01, 16, optimizer="adam", weight_decay=0.1, augmentation="noise"),
        Training(2, 0.05, 16, momentum=0.9, keep_optimizer=True, augmentation="noise"),
    ):
        heads = head_after_each(run_of(stream, small_mlp(6), cpu, training, distillation=0.0))
        for step in range(3):
            moved = (heads[step + 1] != heads[step]).any(1)
            assert moved.nonzero().flatten().tolist() == [2 * step, 2 * step + 1]


def test_prototypes_take_plain_steps_of_their_own_learning_rate(stream, small_mlp, cpu):
    moves = []
    for lr in (0.01, 0.02):
        single = Training(1, 0.05, 1000, momentum=0.9, weight_decay=0.1)
        run = run_of(stream, small_mlp(6), cpu, single, prototype_lr=lr)
        before = run.learner.student.model.head.weight.detach().clone()
        run.advance()
        moves.append(run.learner.student.model.head.weight.detach() - before)
    torch.testing.assert_close(2 * moves[0], moves[1], rtol=1e-4, atol=1e-6)
    assert moves[0].abs().max() > 0


def test_distillation_is_silent_in_the_first_experience(stream, small_mlp, cpu, weights):
    found = []
    for beta in (0.0, 50.0):
        run = run_of(stream, small_mlp(6), cpu, distillation=beta)
        run.advance()
        found.append(weights(run.learner))
    assert torch.equal(*found)


def test_the_old_network_is_asked_in_evaluation_mode_about_the_same_views(stream, cpu, monkeypatch):
    seen = []
    model = build_model("small_resnet", (1, 8, 8), 6, seed=0, width=4)
    run = run_of(stream, model, cpu, Training(1, 0.01, 16, augmentation="noise"))
    run.advance()
    student, original = run.learner.student, type(run.task).features

    def spy(task, network, batch):
        seen.append((network is student.model, network.training, batch["input"]))
        return original(task, network, batch)

    monkeypatch.setattr(type(run.task), "features", spy)
    run.learner.observe(stream[1])
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert pairs
    for (own, training, views), (other, frozen, same) in pairs:
        assert own and training and not other and not frozen
        assert torch.equal(views, same)


def test_the_first_experience_gets_its_further_passes(stream, small_mlp, cpu):
    steps = []
    for extra in (0, 3):
        run = run_of(stream, small_mlp(6), cpu, extra_first=extra)
        for _ in range(2):
            run.advance()
            steps.append(run.learner.student.steps)
    assert steps[0] * 5 / 2 == steps[2]  # two passes, or two and three
    assert steps[1] - steps[0] == steps[3] - steps[2]


def test_answers_with_a_task_id_are_the_nearest_prototype_of_the_task(few_digits, small_mlp, cpu):
    stream = parse_stream("task:3x2", few_digits)
    learner = learn("prd", stream, small_mlp(6), training=TRAINING, runtime=cpu(), **SMALL).learner
    inputs = few_digits.tensors["input"][:50]
    with torch.no_grad():
        features = learner.student.features({"input": inputs})
    cosine = torch.cosine_similarity(features[:, None], learner.student.model.head.weight[None], dim=2)
    for task, classes in enumerate([(0, 1), (2, 3), (4, 5)]):
        found = learner.predict({"input": inputs, "task": torch.full((50,), task)})
        assert torch.equal(found, cosine[:, list(classes)].argmax(1) + classes[0])
    with pytest.raises(MissingTaskId):
        learner.predict({"input": inputs})


def test_the_projection_takes_no_part_in_answers(stream, small_mlp, cpu):
    learner = learn("prd", stream, small_mlp(6), training=TRAINING, runtime=cpu(), **SMALL).learner
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    before = learner.predict({"input": inputs})
    with torch.no_grad():
        for parameter in learner.student.attached["projection"].parameters():
            parameter.zero_()
    assert torch.equal(before, learner.predict({"input": inputs}))


def test_relations_keep_old_tasks_usable_without_a_stored_record(digits):
    stream = parse_stream("task:5x2", digits)
    training = Training(6, 0.1, 32, augmentation="noise")
    accuracy = {}
    for beta in (0.0, 4.0):
        model = build_model("mlp", (1, 8, 8), 10, seed=0, width=100)
        settings = {"hidden": 64, "projected": 32, "extra_first": 6, "distillation": beta}
        run = learn(
            "prd", stream, model, training=training, runtime=Runtime(seed=0, device="cpu"), **settings
        )
        accuracy[beta] = run.matrix.average
        assert set(run.learner.state_dict()) == {"student", "earlier"}
    assert accuracy[4.0] > accuracy[0.0] + 0.1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"distillation_temperature": -1.0}, "distillation_temperature"),
        ({"distillation": -1.0}, "distillation"),
        ({"prototypes": float("nan")}, "prototypes"),
        ({"axis": "row"}, "axis"),
        ({"prototype_lr": 0.0}, "prototype_lr"),
        ({"hidden": 0}, "hidden"),
        ({"extra_first": -1}, "extra_first"),
    ],
)
def test_bad_settings_are_refused(settings, word):
    with pytest.raises(InvalidHyperparameter, match=word):
        build_learner("prd", settings)


def test_features_and_prototypes_of_different_size_are_refused(drawn):
    with pytest.raises(ModelMismatch, match="3 dimensions, prototypes 2"):
        relation_distillation(drawn[0], drawn[1][:, :2], drawn[2], drawn[3][:, :2], [[0]])


def test_a_domain_incremental_stream_is_refused():
    with pytest.raises(ModelMismatch, match="domain"):
        build_learner("prd", {}, "domain")


def test_its_settings_can_be_searched():
    assert set(LEARNERS.get("prd").card.search) == {"temperature", "prototypes", "distillation", "axis"}
