from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFiniteLoss
from palimpsest.models import build_model
from palimpsest.retain import LEARNERS, Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.cosine import (
    cosine_cross_entropy,
    cosine_logits,
    product_cross_entropy,
    product_logits,
    unit,
)
from palimpsest.retain.methods.uer import unbiased_loss

ONLINE = Training(epochs=1, lr=0.05, batch_size=10)


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    vectors = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return features, vectors, torch.arange(12) % 4


@pytest.fixture(scope="module")
def stream(digits):
    return parse_stream("class:5x2:online", digits)


def by_hand(features, vectors, labels, new, temperature):
    """The loss record by record."""
    losses = []
    for number, (h, y) in enumerate(zip(features.numpy(), labels.tolist(), strict=True)):
        products = vectors.numpy() @ h
        lengths = np.linalg.norm(vectors.numpy(), axis=1) * np.linalg.norm(h)
        logits = products / lengths / temperature if number < new else products
        losses.append(np.log(np.exp(logits).sum()) - logits[y])
    return np.mean(losses[:new]) + (np.mean(losses[new:]) if new < len(losses) else 0.0)


@pytest.mark.parametrize("new", [5, 12])
def test_new_records_are_learned_by_cosines_and_replayed_ones_by_products(drawn, new):
    features, vectors, labels = drawn
    found = unbiased_loss(features, vectors, labels, new, 0.09)
    assert found.item() == pytest.approx(by_hand(features, vectors, labels, new, 0.09), abs=1e-4)


def test_swapping_the_two_branches_changes_the_loss(drawn):
    features, vectors, labels = drawn
    plain, swapped = (unbiased_loss(features, vectors, labels, 5, 0.09, flag) for flag in (False, True))
    order = torch.cat([torch.arange(5, 12), torch.arange(5)])
    other = by_hand(features[order], vectors, labels[order], 7, 0.09)
    assert swapped.item() == pytest.approx(other, abs=1e-4)
    assert abs(plain.item() - swapped.item()) > 0.1


def test_cosines_change_no_length_to_first_order_and_products_do(drawn):
    for loss, turns_only in (
        (lambda h, w, y: cosine_cross_entropy(h, w, y, 0.09), True),
        (product_cross_entropy, False),
    ):
        features, vectors = (rows.clone().requires_grad_() for rows in drawn[:2])
        loss(features, vectors, drawn[2]).backward()
        for rows in (features, vectors):
            along = (rows * rows.grad).sum(1).abs() / (rows.norm(dim=1) * rows.grad.norm(dim=1))
            assert bool((along < 1e-5).all()) is turns_only


def test_a_logit_is_two_lengths_and_an_angle(drawn):
    features, vectors, _ = drawn
    lengths = features.norm(dim=1)[:, None] * vectors.norm(dim=1)
    torch.testing.assert_close(
        lengths * cosine_logits(features, vectors), product_logits(features, vectors), rtol=1e-5, atol=1e-5
    )


def test_a_vector_of_length_zero_stays_zero():
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_features_are_not_normalised_in_place(drawn):
    features = drawn[0].clone()
    unbiased_loss(features, drawn[1], drawn[2], 5, 0.09)
    assert torch.equal(features, drawn[0])


def test_a_bias_of_the_head_takes_no_part(stream, small_mlp, cpu):
    biased = small_mlp(10)
    with torch.no_grad():
        biased.head.bias[:] = 100.0 * torch.arange(10)
    plain = small_mlp(10)
    outcomes = [
        learn("uer", stream, model, training=ONLINE, runtime=cpu(), memory=50) for model in (plain, biased)
    ]
    np.testing.assert_array_equal(*(outcome.matrix.scores for outcome in outcomes))
    assert torch.equal(outcomes[1].learner.student.model.head.bias, biased.head.bias)


def test_a_head_without_a_bias_can_be_demanded(stream, small_mlp, cpu):
    with pytest.raises(ModelMismatch, match="has a bias"):
        learn("uer", stream, small_mlp(10), training=ONLINE, runtime=cpu(), strict=True)
    model = small_mlp(10)
    model.head = nn.Linear(24, 10, bias=False)
    run = Run(build_learner("uer", {"strict": True, "memory": 20}), stream, model, runtime=cpu())
    run.advance()
    assert run.rows[0][0] > 0.5


def test_there_is_one_step_per_batch_of_new_records(stream, small_mlp, cpu):
    run = Run(build_learner("uer", {"memory": 50}), stream, small_mlp(10), training=ONLINE, runtime=cpu())
    run.advance()
    records, rest = divmod(len(stream[0].records), 10)
    assert run.learner.student.steps == records + (rest > 1)


def test_answers_are_those_of_largest_product(stream, small_mlp, cpu):
    outcome = learn("uer", stream, small_mlp(10), training=ONLINE, runtime=cpu(), memory=50)
    student = outcome.learner.student
    inputs = stream[0].test.tensors["input"]
    expected = student.features({"input": inputs}) @ student.model.head.weight.T
    assert torch.equal(outcome.learner.predict({"input": inputs}), expected.argmax(1))


@pytest.fixture(scope="module")
def ends(stream):
    """ER and UER on digits with 50 records kept, and UER with another read-out of the same network."""
    from palimpsest.core.runtime import Runtime

    made = {}
    for name in ("er", "uer"):
        model = build_model("mlp", (1, 8, 8), 10, seed=0, width=100)
        settings = {"memory": 50} | ({"temperature": 0.05} if name == "uer" else {})
        made[name] = learn(
            name, stream, model, training=ONLINE, runtime=Runtime(seed=0, device="cpu"), **settings
        )
    return made


def test_it_keeps_earlier_tasks_better_than_er_and_leans_less_to_the_newest(ends):
    earlier = {name: outcome.matrix.at_the_end[:-1].mean() for name, outcome in ends.items()}
    newest = {name: outcome.matrix.at_the_end[-1] for name, outcome in ends.items()}
    assert earlier["uer"] > earlier["er"] + 0.05
    assert newest["uer"] - earlier["uer"] < newest["er"] - earlier["er"] - 0.15


def test_reading_cosines_throws_away_what_replay_taught(ends, stream):
    student = ends["uer"].learner.student
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    labels = torch.cat([experience.test.tensors["label"] for experience in stream])
    with torch.no_grad():
        cosine = cosine_logits(student.features({"input": inputs}), student.model.head.weight).argmax(1)
    product = ends["uer"].learner.predict({"input": inputs})
    assert (product == labels).float().mean() > (cosine == labels).float().mean() + 0.15


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"memory": 0}, "memory"),
        ({"replay_batch": 0}, "replay_batch"),
    ],
)
def test_bad_settings_are_refused(settings, word):
    with pytest.raises(InvalidHyperparameter, match=word):
        build_learner("uer", settings)


def test_a_label_outside_the_head_is_named():
    with pytest.raises(ModelMismatch, match="Label 7 is outside the head of 4"):
        product_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 7]))


def test_features_that_are_not_finite_stop_it(stream, small_mlp, cpu):
    run = Run(build_learner("uer", {"memory": 50}), stream, small_mlp(10), training=ONLINE, runtime=cpu())
    with torch.no_grad():
        run.learner.student.model.hidden[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss):
        run.advance()


def test_its_settings_can_be_searched():
    assert set(LEARNERS.get("uer").card.search) == {"temperature", "replay_batch"}
