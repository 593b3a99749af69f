from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import palimpsest.retain.methods.hpcr as module
from palimpsest.core.errors import InvalidHyperparameter, InvalidLabels, ModelMismatch
from palimpsest.core.runtime import Runtime
from palimpsest.models import build_model
from palimpsest.retain import LEARNERS, Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.contrast import contrast, supervised_contrast
from palimpsest.retain.methods.hpcr import class_distillation, sample_distillation, wave
from palimpsest.retain.methods.pcr import proxy_contrast, two_views

ONLINE = Training(epochs=1, lr=0.05, batch_size=10, augmentation="jitter")
OFF = {
    "sample_pairs_from": None, "tau_min": 1.0, "tau_max": 1.0, "class_distillation": 0.0, "sample_distillation": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    vectors = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return features, vectors, torch.tensor([0, 3, 3, 1, 0, 3, 1])


def turned(rows):
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)


def by_hand(features, vectors, labels, temperature, pairs):
    """The contrastive loss, pair by pair."""
    records, proxies = turned(features.numpy()), turned(vectors.numpy()[labels])
    columns = [(None, v, y) for v, y in zip(proxies, labels, strict=True)]
    if pairs != "proxy":
        columns = [(("r", i), v, y) for i, (v, y) in enumerate(zip(records, labels, strict=True))]
        columns += [(("p", i), v, y) for i, (v, y) in enumerate(zip(proxies, labels, strict=True))]
    anchors = [(("r", i), v, y) for i, (v, y) in enumerate(zip(records, labels, strict=True))]
    if pairs == "all":
        anchors = columns
    losses = []
    for name, anchor, label in anchors:
        rest = [(v, y) for other, v, y in columns if other != name or other is None]
        total = sum(math.exp(anchor @ v / temperature) for v, _ in rest)
        own = [anchor @ v / temperature - math.log(total) for v, y in rest if y == label]
        losses.append(-np.mean(own))
    return np.mean(losses)


@pytest.mark.parametrize("pairs", ["proxy", "one", "all"])
def test_the_contrast_is_that_of_its_definition(drawn, pairs):
    features, vectors, labels = drawn
    found = proxy_contrast(features, vectors, labels, 0.3, pairs)
    assert found.item() == pytest.approx(by_hand(features, vectors, labels.numpy(), 0.3, pairs), abs=1e-9)


def test_frequent_classes_weigh_more_than_with_one_column_per_class(drawn):
    features, vectors, labels = drawn
    once = torch.nn.functional.cross_entropy(
        torch.tensor(turned(features.numpy()) @ turned(vectors.numpy()).T / 0.3)[:, [0, 1, 3]],
        torch.tensor([0, 2, 2, 1, 0, 2, 1]),
    )
    assert abs(proxy_contrast(features, vectors, labels, 0.3).item() - once.item()) > 0.05


def test_classes_that_do_not_occur_get_exactly_no_gradient(drawn):
    features, vectors, labels = drawn
    vectors = vectors.clone().requires_grad_()
    for pairs in ("proxy", "one", "all"):
        (gradient,) = torch.autograd.grad(proxy_contrast(features, vectors, labels, 0.09, pairs), vectors)
        assert torch.equal(gradient[[2, 4]], torch.zeros(2, 4, dtype=torch.float64))
        assert (gradient[[0, 1, 3]].abs().sum(1) > 0).all()


def test_the_order_of_records_does_not_matter(drawn):
    features, vectors, labels = drawn
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    for pairs in ("proxy", "one", "all"):
        one = proxy_contrast(features, vectors, labels, 0.09, pairs)
        other = proxy_contrast(features[order], vectors, labels[order], 0.09, pairs)
        assert one.item() == pytest.approx(other.item(), abs=1e-5)


def test_records_without_a_direction_give_a_finite_loss():
    features, vectors = torch.zeros(3, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    loss = proxy_contrast(features, vectors, torch.tensor([0, 1, 1]), 0.09)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert torch.isfinite(features.grad).all() and torch.isfinite(vectors.grad).all()


def test_contrast_needs_a_pair_and_leaves_out_anchors_without_one():
    rows = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    with pytest.raises(InvalidLabels, match="two views"):
        supervised_contrast(rows, torch.tensor([0, 1, 2]), 0.1)
    similarity = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    positive = torch.tensor([[True, False], [False, False]])
    assert contrast(similarity, positive).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_the_wave_starts_low_and_is_highest_at_half_a_period():
    found = [wave(step, 1.8, 0.5625) for step in (0, 250, 500, 125)]
    assert found == pytest.approx([0.5625, 1.8, 0.5625, (1.8 + 0.5625) / 2])


def test_the_wave_begins_again_with_every_experience(few_digits, small_mlp, cpu, monkeypatch):
    stream = parse_stream("class:3x2:online", few_digits)
    steps = []

    def spy(step, *rest):
        steps.append(step)
        return wave(step, *rest)

    monkeypatch.setattr(module, "wave", spy)
    learn("hpcr", stream, small_mlp(6), training=ONLINE, runtime=cpu(), memory=30)
    assert steps == [
        1,
        2,
        3,
        4,
        *range(5),
        *range(5),
    ]  # 48 records each; nothing to replay at the very first step


def test_class_distillation_is_a_mean_square_over_the_labels_with_repeats():
    logits, stored = torch.tensor([[1.0, 2.0, 5.0], [0.0, 1.0, 1.0]]), torch.zeros(2, 3)
    labels = torch.tensor([0, 1, 1])
    expected = np.mean([[1, 4, 4], [0, 1, 1]])
    assert class_distillation(logits, stored, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("stored", [torch.zeros(2, 2), torch.tensor([[0.0, 0.0, np.nan]] * 2)])
def test_classes_that_were_not_there_when_a_record_was_stored_are_left_out(stored):
    logits = torch.tensor([[1.0, 2.0, 5.0], [0.0, 1.0, 1.0]], requires_grad=True)
    loss = class_distillation(logits, stored.float(), torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(np.mean([[1, 4], [0, 1]]))
    assert torch.equal(logits.grad[:, 2], torch.zeros(2))


def test_sample_distillation_is_the_cross_entropy_of_rows_without_their_diagonal(drawn):
    features, stored = drawn[0][:4], drawn[0][3:]
    rows = []
    for i in range(4):
        a, b = (
            np.array([turned(f.numpy())[i] @ turned(f.numpy())[j] for j in range(4) if j != i]) / 0.3
            for f in (features, stored)
        )
        target = np.exp(b) / np.exp(b).sum()
        rows.append(-(target * (a - np.log(np.exp(a).sum()))).sum())
    found = sample_distillation(features, stored, 0.3)
    assert found.item() == pytest.approx(np.mean(rows), abs=1e-9)


def test_without_its_components_it_is_pcr_to_the_last_bit(few_digits, small_mlp, cpu, weights):
    stream = parse_stream("class:3x2:online", few_digits)
    plain = learn("pcr", stream, small_mlp(6), training=ONLINE, runtime=cpu(), memory=30)
    off = learn("hpcr", stream, small_mlp(6), training=ONLINE, runtime=cpu(), memory=30, **OFF)
    assert torch.allclose(weights(plain.learner), weights(off.learner), atol=1e-6)


@pytest.mark.parametrize(
    "component",
    [
        {"sample_pairs_from": 1},
        {"tau_min": 0.5625, "tau_max": 1.8},
        {"class_distillation": 0.1},
        {"sample_distillation": 0.5},
    ],
)
def test_each_component_alone_changes_what_is_learned(component, few_digits, small_mlp, cpu, weights):
    stream = parse_stream("class:2x2:online", few_digits)
    plain = learn("pcr", stream, small_mlp(4), training=ONLINE, runtime=cpu(), memory=30)
    with_it = learn(
        "hpcr", stream, small_mlp(4), training=ONLINE, runtime=cpu(), memory=30, **{**OFF, **component}
    )
    assert not torch.allclose(weights(plain.learner), weights(with_it.learner), atol=1e-4)


def test_nothing_is_distilled_in_the_first_experience(few_digits, small_mlp, cpu, weights):
    stream = parse_stream("class:2x2:online", few_digits)
    found = []
    for alpha, beta in ((0.0, 0.0), (0.5, 1.0)):
        settings = {"memory": 30, "class_distillation": alpha, "sample_distillation": beta}
        run = Run(build_learner("hpcr", settings), stream, small_mlp(4), training=ONLINE, runtime=cpu())
        run.advance()
        found.append(weights(run.learner))
    assert torch.equal(*found)


def test_what_is_stored_is_what_the_network_said_then_of_the_image_itself(few_digits, small_mlp, cpu):
    stream = parse_stream("class:2x2:online", few_digits)
    learner = build_learner("hpcr", {"memory": 2000})
    run = Run(
        learner, stream, small_mlp(4), training=Training(1, 1e-12, 10, augmentation="jitter"), runtime=cpu()
    )
    run.advance()
    rows, student = learner.kept.all(), learner.student  # at this learning rate the network does not move
    features = student.features({"input": rows["input"]})
    torch.testing.assert_close(rows["features"], features, atol=1e-5, rtol=1e-4)
    weight = student.model.head.weight
    cosine = torch.cosine_similarity(features[:, None], weight[None], dim=2) / 0.09
    torch.testing.assert_close(rows["logits"], cosine, atol=1e-3, rtol=1e-3)
    assert not rows["logits"].requires_grad and not rows["features"].requires_grad


def test_stored_answers_are_not_refreshed_when_replayed(few_digits, small_mlp, cpu):
    stream = parse_stream("class:2x2:online", few_digits)
    learner = build_learner("hpcr", {"memory": 2000})
    run = Run(learner, stream, small_mlp(4), training=ONLINE, runtime=cpu())
    run.advance()
    before = {name: value.clone() for name, value in learner.kept.all().items()}
    run.advance()
    for name, value in before.items():
        assert torch.equal(learner.kept.all()[name][: len(value)], value)


def test_the_first_batch_only_fills_the_buffer(few_digits, small_mlp, cpu, weights):
    stream = parse_stream("class:3x2:online", few_digits)
    for name in ("pcr", "hpcr"):
        whole = Training(epochs=1, lr=0.05, batch_size=1000)
        run = Run(build_learner(name, {"memory": 30}), stream, small_mlp(6), training=whole, runtime=cpu())
        before = weights(run.learner)
        run.advance()
        assert torch.equal(before, weights(run.learner)) and len(run.learner.kept) == 30


def test_both_views_go_through_the_network_together_and_the_first_is_plain(few_digits, small_mlp, cpu):
    stream = parse_stream("class:2x2", few_digits)
    learner = build_learner("pcr")
    run = Run(learner, stream, small_mlp(4), training=ONLINE, runtime=cpu())
    student = run.learner.student
    batch = {"input": few_digits.tensors["input"][:6], "label": torch.zeros(6, dtype=torch.long)}
    found = two_views(student, batch)
    torch.testing.assert_close(found[:6], student.features(batch))
    assert not torch.allclose(found[6:], found[:6])


def test_answers_are_those_of_largest_cosine(few_digits, small_mlp, cpu):
    stream = parse_stream("class:3x2:online", few_digits)
    inputs = few_digits.tensors["input"]
    for name in ("pcr", "hpcr"):
        learner = learn(name, stream, small_mlp(6), training=ONLINE, runtime=cpu(), memory=30).learner
        with torch.no_grad():
            features = learner.student.features({"input": inputs})
            cosine = torch.cosine_similarity(
                features[:, None], learner.student.model.head.weight[None], dim=2
            )
        assert (learner.predict({"input": inputs}) == cosine.argmax(1)).float().mean() > 0.99


def test_contrast_with_class_vectors_forgets_far_less_than_er(digits):
    stream = parse_stream("class:5x2:online", digits)
    end = {
        name: learn(
            name, stream, build_model("mlp", (1, 8, 8), 10, seed=0, width=64), training=ONLINE,
            runtime=Runtime(seed=0, device="cpu"), memory=50,
        ).matrix.average
        for name in ("er", "pcr")
    }  # fmt: skip
    assert end["pcr"] > end["er"] + 0.1


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("pcr", {"temperature": 0.0}, "temperature"),
        ("pcr", {"pairs": "both"}, "pairs"),
        ("pcr", {"memory": 0}, "memory"),
        ("hpcr", {"temperature": -1.0}, "temperature"),
        ("hpcr", {"tau_min": 2.0}, "tau_min"),
        ("hpcr", {"tau_min": 0.0}, "tau_min"),
        ("hpcr", {"period": 0}, "period"),
        ("hpcr", {"class_distillation": -0.1}, "class_distillation"),
        ("hpcr", {"sample_distillation": float("inf")}, "sample_distillation"),
        ("hpcr", {"sample_pairs_from": 0}, "sample_pairs_from"),
        ("hpcr", {"replay_batch": 0}, "replay_batch"),
    ],
)
def test_bad_settings_are_refused(name, settings, word):
    with pytest.raises(InvalidHyperparameter, match=word):
        build_learner(name, settings)


def test_a_label_outside_the_head_is_named(drawn):
    with pytest.raises(ModelMismatch, match="Label 9 is outside the head of 5"):
        proxy_contrast(drawn[0][:2], drawn[1], torch.tensor([0, 9]), 0.09)


def test_more_replay_than_there_is_takes_what_there_is(few_digits, small_mlp, cpu):
    stream = parse_stream("class:2x2:online", few_digits)
    outcome = learn("hpcr", stream, small_mlp(4), training=ONLINE, runtime=cpu(), memory=5, replay_batch=100)
    assert np.isfinite(outcome.matrix.scores[-1]).all()


def test_a_buffer_of_another_method_is_refused(few_digits, small_mlp, cpu):
    stream = parse_stream("class:2x2:online", few_digits)
    other = learn("pcr", stream, small_mlp(4), training=ONLINE, runtime=cpu(), memory=20).learner
    run = Run(build_learner("hpcr"), stream, small_mlp(4), training=ONLINE, runtime=cpu())
    with pytest.raises(ModelMismatch, match="needs logits and features"):
        run.learner.load_state_dict(other.state_dict())


def test_a_bias_of_the_head_takes_no_part(few_digits, small_mlp, cpu):
    stream = parse_stream("class:2x2:online", few_digits)
    plain, without = small_mlp(4), small_mlp(4)
    without.head = nn.Linear(24, 4, bias=False)
    without.head.weight = nn.Parameter(plain.head.weight.detach().clone())
    for name in ("pcr", "hpcr"):
        found = [
            learn(name, stream, model, training=ONLINE, runtime=cpu(), memory=20).matrix.scores
            for model in (plain, without)
        ]
        np.testing.assert_array_equal(*found)


def test_their_settings_can_be_searched():
    assert {"class_distillation", "sample_distillation"} <= set(LEARNERS.get("hpcr").card.search)
    assert set(LEARNERS.get("pcr").card.search) == {"temperature", "replay_batch"}
