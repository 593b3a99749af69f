from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InvalidHyperparameter, InvalidStream, ModelMismatch, NotTrained
from palimpsest.core.runtime import Runtime
from palimpsest.models import build_model
from palimpsest.retain import LEARNERS, Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.coding_vectors import (
    distance_cross_entropy,
    distances,
    mixed,
    neighbourhood_loss,
    updated_edges,
)
from palimpsest.retain.prototypes import Prototypes

TRAINING = Training(epochs=2, lr=0.001, batch_size=16, optimizer="adam")
GENTLE = {"vector_lr": 0.5, "later_vector_lr": 0.5, "temperature": 1.0, "distillation": 0.1}


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    vectors = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return features, vectors, torch.arange(9) % 6


@pytest.fixture(scope="module")
def stream(few_digits):
    return parse_stream("class:2,2,2", few_digits)


def run_of(stream, model, cpu, training=TRAINING, **settings):
    return Run(
        build_learner("napa-vq", {**GENTLE, **settings}), stream, model, training=training, runtime=cpu()
    )


def edges_by_hand(edges, gaps, k, decay):
    """Edges after a batch, record by record."""
    edges = edges.copy()
    order = [np.argsort(row)[:k] for row in gaps]
    for winner in {int(row[0]) for row in order}:
        won = [row for row in order if row[0] == winner]
        for j in range(len(edges)):
            count = sum(j in row for row in won)
            if count:
                edges[winner, j] = max(edges[winner, j], 1.0)
            edges[winner, j] *= decay ** (len(won) - count)
    edges[edges < decay**10 * (1 - 1e-12)] = 0.0
    return edges


@pytest.mark.parametrize("k", [1, 2, 4, 20])
def test_edges_follow_winners_and_their_neighbours(drawn, k):
    edges = np.eye(6)
    for batch in range(4):
        gaps = distances(drawn[0] * (1 + batch), drawn[1])
        found = updated_edges(torch.tensor(edges), gaps, k, 0.9).numpy()
        np.testing.assert_allclose(found, edges_by_hand(edges, gaps.numpy(), k, 0.9), atol=1e-9)
        edges = (found + found.T) / 2


def test_an_edge_that_is_missed_ten_times_stays_and_eleven_times_is_cut():
    for missed, expected in ((10, 0.9**10), (11, 0.0)):
        gaps = torch.tensor([[0.0, 1.0, 2.0]] + [[0.0, 2.0, 1.0]] * missed)
        assert updated_edges(torch.eye(3), gaps, 2)[0, 1].item() == pytest.approx(expected)


def test_after_every_batch_edges_are_symmetric_and_cut_and_some_are_missing():
    generator = torch.Generator().manual_seed(1)
    vectors, edges = torch.randn(40, 8, generator=generator), torch.eye(40)
    for _ in range(10):
        x = vectors[torch.randint(40, (64,), generator=generator)] + torch.randn(64, 8, generator=generator)
        edges = updated_edges(edges, distances(x, vectors), 5)
        edges = (edges + edges.T) / 2
        assert torch.equal(edges, edges.T)
        assert torch.equal(edges.diagonal(), torch.ones(40))
        assert ((edges == 0) | ((edges >= 0.9**10 / 2) & (edges <= 1))).all()
    assert (edges == 0).float().mean() > 0.3


def loss_by_hand(gaps, labels, near, scale):
    found = []
    for row, y in zip(gaps.numpy() ** 2, labels.tolist(), strict=True):
        others = [j for j in range(len(row)) if near[y, j] and j != y]
        weights = np.exp([-scale * row[j] for j in others])
        pull = (weights / weights.sum() @ row[others]) if others else 0.0
        found.append(max(0.0, row[y] - pull))
    return np.mean(found)


@pytest.mark.parametrize("scale", [0.001, 1.0])
def test_features_are_drawn_nearer_to_their_own_vector_than_to_its_neighbours(drawn, scale):
    near = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    near[3] = False  # a label without neighbours
    gaps = distances(*drawn[:2])
    found = neighbourhood_loss(gaps, drawn[2], near, scale)
    assert found.item() == pytest.approx(loss_by_hand(gaps, drawn[2], near.numpy(), scale))


def test_weights_of_neighbours_have_no_gradient():
    x = torch.tensor([[3.0, 0.0]], requires_grad=True)
    vectors = torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 0.0]])
    near = torch.ones(3, 3, dtype=torch.bool)
    neighbourhood_loss(distances(x, vectors), torch.tensor([0]), near, 1.0).backward()
    weights = np.exp([-1.0, -4.0])
    weights = weights / weights.sum()
    pulls = [2 * (x.detach()[0] - vector).numpy() for vector in vectors]
    expected = pulls[0] - weights[0] * pulls[1] - weights[1] * pulls[2]
    np.testing.assert_allclose(x.grad[0].numpy(), expected, atol=1e-5)


def test_the_cross_entropy_takes_plain_distances(drawn):
    gaps = np.linalg.norm(drawn[0].numpy()[:, None] - drawn[1].numpy(), axis=2)
    logits = -gaps / 0.5
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(9), drawn[2].numpy()])
    found = distance_cross_entropy(distances(*drawn[:2]), drawn[2], 0.5)
    assert found.item() == pytest.approx(expected)


def test_a_feature_on_its_vector_has_a_finite_gradient():
    x = torch.ones(2, 3, requires_grad=True)
    gaps = distances(x, torch.ones(1, 3))
    (distance_cross_entropy(gaps, torch.zeros(2, dtype=torch.long), 0.1) + gaps.square().sum()).backward()
    assert torch.isfinite(x.grad).all()


def test_prototypes_are_means_over_all_batches_and_replace_those_of_the_same_labels():
    kept = Prototypes(4, 2, torch.device("cpu"))
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    kept.put([(rows[:2], torch.tensor([1, 3])), (rows[2:], torch.tensor([1]))])
    assert torch.equal(kept.of(torch.tensor([1, 3])), torch.tensor([[3.0, 1.0], [3.0, 4.0]]))
    kept.put([(torch.zeros(1, 2), torch.tensor([1]))])
    assert torch.equal(kept.of(torch.tensor([1, 3])), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    with pytest.raises(NotTrained, match="label 2"):
        kept.of(torch.tensor([2]))


def test_mixtures_lie_nearer_to_a_border_than_prototypes():
    generator = torch.Generator().manual_seed(4)
    prototypes = 3 * torch.randn(8, 5, generator=generator)
    gaps = distances(prototypes, prototypes)
    neighbour = gaps.topk(2, largest=False).indices[:, 1]
    gamma = 0.5 + 0.5 * torch.rand(8, 1, generator=generator)

    def margin(features):
        found = distances(features, prototypes)
        own = found.diagonal()
        return (found.masked_fill(torch.eye(8, dtype=torch.bool), float("inf")).amin(1) - own).mean()

    assert margin(mixed(prototypes, prototypes[neighbour], gamma)) < 0.9 * margin(prototypes)


def test_turned_images_have_labels_of_their_own(few_digits, small_mlp, stream, cpu):
    learner = run_of(stream, small_mlp(6), cpu).learner
    batch = {"input": few_digits.tensors["input"][:2], "label": torch.tensor([1, 5])}
    views, labels = learner._turned(batch)
    assert labels.tolist() == [4, 20, 5, 21, 6, 22, 7, 23]
    for turn in range(4):
        expected = np.rot90(batch["input"].numpy(), turn, (-2, -1))
        np.testing.assert_array_equal(views[2 * turn : 2 * turn + 2].numpy(), expected)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_vectors_of_old_classes_stay_to_the_bit_and_new_ones_move(stream, small_mlp, cpu, optimizer):
    momentum = 0.9 if optimizer == "sgd" else 0.0
    training = Training(2, 0.001, 16, optimizer, momentum, weight_decay=0.1)
    run = run_of(stream, small_mlp(6), cpu, training)
    before = run.learner.vectors.detach().clone()
    for step in range(3):
        run.advance()
        after = run.learner.vectors.detach().clone()
        moved = (after != before).any(1)
        assert moved.tolist() == [False] * 8 * step + [True] * 8 + [False] * 8 * (2 - step)
        before = after


def test_prototypes_of_old_classes_are_never_refreshed_and_new_ones_are_of_the_new_network(
    stream, small_mlp, cpu
):
    run = run_of(stream, small_mlp(6), cpu)
    run.advance()
    before = run.learner.prototypes.means.clone()
    run.advance()
    after = run.learner.prototypes.means
    assert torch.equal(before[:8], after[:8]) and after[16:].isnan().all()
    student, tensors = run.learner.student, stream[1].records.tensors
    with torch.no_grad():
        for label in (2, 3):
            for turn in range(4):
                images = torch.rot90(tensors["input"][tensors["label"] == label], turn, (-2, -1))
                expected = student.features({"input": images}).mean(0)
                torch.testing.assert_close(after[4 * label + turn], expected, atol=1e-5, rtol=1e-4)


def test_mixtures_are_of_old_classes_and_their_neighbours(stream, small_mlp, cpu):
    run = run_of(stream, small_mlp(6), cpu, neighbours=3)
    run.advance()
    run.advance()
    learner, draws = run.learner, torch.Generator().manual_seed(0)
    old, met = torch.tensor([0, 1]), torch.arange(16)
    mixtures, roots = learner._mixed(old, met, 300, draws)
    assert set(roots.tolist()) == {0, 4}
    means = learner.prototypes.means
    for root in (0, 4):
        near = torch.nonzero(learner.edges[root, :16] > 0).flatten()
        steps = mixtures[roots == root] - means[root]  # (1 - gamma) (P_n - P_root)
        lines = means[near] - means[root]
        share = (steps @ lines.T) / lines.square().sum(1).clamp_min(1e-12)
        rest = (steps[:, None] - share[:, :, None] * lines).norm(dim=2)
        best = rest.argmin(1)
        assert rest.amin(1).max() < 1e-4
        chosen = share[torch.arange(len(best)), best]
        assert chosen.min() > -1e-5 and chosen.max() < 0.5 + 1e-5


def test_edges_of_a_run_are_symmetric_and_those_of_unmet_labels_untouched(stream, small_mlp, cpu):
    run = run_of(stream, small_mlp(6), cpu, neighbours=3)
    run.advance()
    edges = run.learner.edges
    assert torch.equal(edges, edges.T) and torch.equal(edges[8:, 8:], torch.eye(16))
    assert (edges[:8, 8:] == 0).all() and (edges[:8, :8] > 0).sum() > 8


def test_distillation_is_the_frobenius_norm_of_the_whole_batch(stream, small_mlp, cpu, monkeypatch):
    """Two runs that differ in its weight alone take the same first step (the norm is 0), and then differ by it."""
    losses, gaps = [], []
    for weight in (0.0, 2.0):
        run = run_of(stream, small_mlp(6), cpu, Training(1, 0.01, 16), mixtures=0.0, distillation=weight)
        run.advance()
        student, new, old, seen = run.learner.student, [], [], []
        features, backward = type(run.task).features, type(student).backward

        def spy(task, network, batch, own=student.model, features=features, new=new, old=old):
            found = features(task, network, batch)
            if network.training or network is not own:
                (new if network is own else old).append(found.detach())
            return found

        def keep(student, loss, backward=backward, seen=seen):
            seen.append(loss.item())
            backward(student, loss)

        with monkeypatch.context() as patched:
            patched.setattr(type(run.task), "features", spy)
            patched.setattr(type(student), "backward", keep)
            run.advance()
        losses.append(seen[1])
        gaps.append([float(np.linalg.norm((a - b).numpy())) for a, b in zip(new, old, strict=True)])
    assert gaps[0][0] == gaps[1][0] == 0
    assert gaps[0][1] == pytest.approx(gaps[1][1], rel=1e-4) and gaps[0][1] > 0
    assert losses[1] - losses[0] == pytest.approx(2.0 * gaps[0][1], rel=1e-2)


def test_answers_are_the_nearest_vector_of_unturned_classes_of_length_one(stream, small_mlp, cpu):
    run = run_of(stream, small_mlp(6), cpu)
    run.advance()
    run.advance()
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    with torch.no_grad():
        features = run.learner.student.features({"input": inputs})
    vectors = run.learner.vectors.detach()[[0, 4, 8, 12]]
    cosine = torch.cosine_similarity(features[:, None], vectors[None], dim=2)
    assert torch.equal(run.learner.predict({"input": inputs}), cosine.argmax(1))


def test_learning_rates_fall_as_published(stream, small_mlp, cpu, monkeypatch):
    run = run_of(stream, small_mlp(6), cpu, Training(3, 0.001, 64, "adam"), lr_drop=2, later_lr=0.3)
    seen, step = [], type(run.learner.student).apply

    def spy(student):
        seen.append(student.optimizer.param_groups[0]["lr"])
        step(student)

    monkeypatch.setattr(type(run.learner.student), "apply", spy)
    run.advance()
    run.advance()
    assert seen == pytest.approx([1e-3, 1e-3, 1e-4, 3e-4, 3e-4, 3e-5])


def test_without_turns_it_takes_inputs_of_any_shape(few_digits, cpu):
    stream = parse_stream("class:2,2", few_digits)
    with pytest.raises(ModelMismatch, match="square"):
        wide = build_learner("napa-vq", GENTLE)
        Run(wide, stream, build_model("mlp", (1, 8, 8), 4, seed=0), runtime=cpu())
        wide._check(type("E", (), {"classes": (0,), "records": [{"input": torch.zeros(1, 4, 8)}]})())
    model = build_model("mlp", (1, 8, 8), 4, seed=0, width=16)
    outcome = learn("napa-vq", stream, model, training=TRAINING, runtime=cpu(), rotations=False, **GENTLE)
    assert outcome.learner.vectors.shape == (4, 16)


def test_a_class_that_returns_is_refused_before_anything_is_learned(stream, small_mlp, cpu, weights):
    run = run_of(stream, small_mlp(6), cpu)
    run.advance()
    before = weights(run.learner)
    with pytest.raises(InvalidStream, match="Class 0 returns"):
        run.learner.observe(stream[0])
    assert torch.equal(before, weights(run.learner))


def test_a_large_first_task_is_learned_by_vectors_alone(digits):
    stream = parse_stream("class:4,2", digits.select(np.flatnonzero(digits.column("label") < 6)))
    training = Training(10, 0.001, 64, "adam")
    run = Run(
        build_learner("napa-vq", {**GENTLE, "vector_lr": 1.0, "rotations": False, "neighbours": 3}),
        stream,
        build_model("mlp", (1, 8, 8), 6, seed=0, width=64),
        training=training,
        runtime=Runtime(seed=0, device="cpu"),
    )
    run.advance()
    assert run.rows[0][0] > 0.93


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"neighbours": 0}, "neighbours"),
        ({"temperature": 0.0}, "temperature"),
        ({"decay": 1.0}, "decay"),
        ({"vector_lr": 0.0}, "vector_lr"),
        ({"mixtures": -1.0}, "mixtures"),
        ({"distillation": float("inf")}, "distillation"),
        ({"lr_drop": 0}, "lr_drop"),
    ],
)
def test_bad_settings_are_refused(settings, word):
    with pytest.raises(InvalidHyperparameter, match=word):
        build_learner("napa-vq", settings)


def test_other_streams_are_refused():
    for scenario in ("task", "domain"):
        with pytest.raises(ModelMismatch, match=scenario):
            build_learner("napa-vq", {}, scenario)


def test_its_settings_can_be_searched():
    assert {"neighbours", "vector_lr", "mixtures", "distillation"} <= set(LEARNERS.get("napa-vq").card.search)
