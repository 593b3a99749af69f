from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.retain import Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.learner import Keeps
from palimpsest.retain.view_schedule import cuts, divergence, epoch_length, pairs, served, slots

FOUR = Training(epochs=8, lr=0.05, batch_size=16)


@pytest.fixture(scope="module")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


@given(st.integers(1, 40), st.integers(1, 5), st.randoms())
def test_over_one_cycle_every_record_is_served_v_times_in_one_run(records, views, random):
    order = torch.tensor(random.sample(range(records), records))
    epochs = [served(order, epoch, views).tolist() for epoch in range(views)]
    assert all(len(epoch) == records for epoch in epochs)  # as many slots as without views
    whole = [record for epoch in epochs for record in epoch]
    runs = [whole[0]] + [b for a, b in pairwise(whole) if a != b]
    assert Counter(whole) == dict.fromkeys(range(records), views)
    assert runs == order.tolist()


@given(st.integers(2, 60), st.integers(1, 4), st.integers(1, 4))
def test_batches_cut_an_epoch_between_records_only(records, views, unique):
    for epoch in range(views):
        places = slots(epoch, epoch_length(records), records, views)
        found = cuts(places % views, unique * views, views)
        assert [stop for _, stop in found[:-1]] == [start for start, _ in found[1:]]
        assert found[0][0] == 0 and found[-1][1] == records
        assert all(int(places[start]) % views == 0 for start, _ in found[1:]) or views == 1
        if records % views == 0:
            assert all(stop - start == unique * views for start, stop in found[:-1])


def test_the_divergence_is_the_kl_computed_by_hand_and_spares_first_views():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    view = torch.tensor([0, 1, 2, 0, 1, 2])
    p = F.softmax(logits.detach(), 1)
    by_hand = sum(
        float((p[a] * (p[a].log() - p[b].log())).sum()) for a, b in ((0, 1), (0, 2), (3, 4), (3, 5))
    )
    found = divergence(logits, view)
    found.backward()
    assert found.item() == pytest.approx(by_hand / 4, rel=1e-12)
    assert torch.equal(logits.grad[[0, 3]], torch.zeros(2, 4, dtype=torch.float64))
    assert (logits.grad[[1, 2, 4, 5]].abs().sum(1) > 0).all()
    assert divergence(logits, view, "official_code").item() == pytest.approx(by_hand / 16, rel=1e-12)


def test_the_divergence_of_equal_views_and_of_single_views_is_zero():
    same = torch.randn(3, 5).repeat_interleave(4, 0)
    assert abs(divergence(same, torch.arange(12) % 4).item()) < 1e-7
    assert divergence(torch.randn(12, 5), torch.zeros(12, dtype=torch.long)).item() == 0
    assert torch.isfinite(divergence(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), torch.tensor([0, 1])))


def test_neighbours_of_one_class_are_not_taken_for_views_of_one_record():
    first, others = pairs(torch.tensor([2, 0, 1, 2, 0, 1, 0]))
    assert list(zip(first.tolist(), others.tolist(), strict=True)) == [(1, 2), (1, 3), (4, 5)]


@pytest.mark.parametrize("base", ["er", "der++", "lwf", "icarl", "a-gem"])
def test_one_view_leaves_the_base_learner_bit_for_bit(base, stream, small_mlp, cpu, weights):
    plain = learn(base, stream, small_mlp(6), training=FOUR, runtime=cpu())
    viewed = learn("view-batch", stream, small_mlp(6), training=FOUR, runtime=cpu(), base=base, views=1, alpha=0.0)  # fmt: skip
    assert torch.equal(weights(plain.learner), weights(viewed.learner))


@pytest.mark.parametrize("base", ["er", "der", "er-ace", "gem", "a-gem", "icarl", "ewc", "si", "joint"])
def test_it_goes_around_any_learner(base, stream, small_mlp, cpu):
    outcome = learn("view-batch", stream, small_mlp(6), training=FOUR, runtime=cpu(), base=base)
    assert outcome.matrix.scores[0, 0] > 0.6
    assert outcome.learner.card.keeps == build_learner(base).card.keeps
    assert (Keeps.ALL_DATA in outcome.learner.card.keeps) == (base == "joint")


def test_records_return_v_times_as_rarely_with_the_same_slots_and_steps(few_digits, small_mlp, cpu):
    stream = parse_stream("class:2x2", few_digits)
    found = {}
    for views in (1, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = learn(
                "view-batch", stream, small_mlp(4), training=Training(80, 0.05, 16), runtime=cpu(), views=views
            )  # fmt: skip
        found[views] = outcome.measures()
    assert found[4]["slots"] == found[1]["slots"]
    assert found[4]["steps"] == found[1]["steps"]
    assert found[4]["visits"] * 4 == found[1]["visits"]
    # between two visits 4 epochs lie in the mean, but for what the ends of an experience cut off
    ratio = found[4]["steps between visits"] / found[1]["steps between visits"]
    assert ratio == pytest.approx(4, rel=0.02)


def test_the_buffer_takes_every_record_once_and_without_augmentation(stream, small_mlp, cpu):
    run = Run(
        build_learner("view-batch", {"settings": {"memory": 500, "every_epoch": False}}),
        stream, small_mlp(6), training=FOUR, runtime=cpu(),
    )  # fmt: skip
    run.advance()
    stored = run.learner.inner.kept.all()["input"].flatten(1)
    originals = stream[0].records.tensors["input"].flatten(1)
    assert len(stored) == len(originals)  # the first cycle of four epochs offers all of them, once
    nearest = torch.cdist(stored, originals).min(1)
    assert float(nearest.values.max()) == 0
    assert len(set(nearest.indices.tolist())) == len(torch.unique(originals, dim=0))


def test_replayed_records_come_in_views_too(stream, small_mlp, cpu):
    run = Run(build_learner("view-batch"), stream, small_mlp(6), training=FOUR, runtime=cpu())
    run.advance()
    seen, logits = [], run.learner.student.logits

    def spy(batch):
        seen.append({name: value.clone() for name, value in batch.items() if torch.is_tensor(value)})
        return logits(batch)

    run.learner.student.logits = spy
    run.advance()
    batch = seen[3]
    assert len(batch["label"]) == 32  # 16 new slots and 16 replayed ones
    assert batch["view"].tolist() == [0, 1, 2, 3] * 8
    groups = batch["input"].unflatten(0, (8, 4))
    assert (batch["label"].unflatten(0, (8, 4)) == batch["label"][::4, None]).all()
    spread = (groups - groups[:, :1]).flatten(2).std(2)[:, 1:]
    assert (spread > 0.1).all() and (spread < 0.2).all()  # noise of deviation 0.15 on top of the first view


def test_the_divergence_draws_views_of_a_record_together(stream, small_mlp, cpu):
    apart = {}
    for alpha in (0.0, 3.0):
        outcome = learn(
            "view-batch", stream, small_mlp(6), training=Training(32, 0.05, 16), runtime=cpu(),
            alpha=alpha, deviation=0.5,
        )  # fmt: skip
        inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
        noisy = inputs + 0.5 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
        logits = outcome.learner.student.model(torch.stack([inputs, noisy], 1).flatten(0, 1))
        apart[alpha] = divergence(logits, torch.arange(len(logits)) % 2).item()
    assert apart[3.0] < 0.8 * apart[0.0]


def test_bad_input_is_named(stream, small_mlp, cpu):
    def refused(error, match, training=FOUR, **settings):
        with pytest.raises(error, match=match):
            learn("view-batch", stream, small_mlp(6), training=training, runtime=cpu(), **settings)

    for views in (0, -1, 2.5, True):
        refused(InvalidHyperparameter, "views", views=views)
    refused(InvalidHyperparameter, "alpha", alpha=-0.1)
    refused(InvalidHyperparameter, "multiple of 3", views=3)
    refused(InvalidHyperparameter, "strong", strong="blur")
    refused(InvalidHyperparameter, "reduction", reduction="sum")
    refused(InvalidHyperparameter, "itself", base="view-batch")
    refused(InvalidHyperparameter, "rounded down", rounded_to=1000)
    refused(UnknownName, "er-acc", base="er-acc")
    refused(InvalidRecords, "do not fill", views=2, training=Training(8, 0.05, 200))
    refused(ModelMismatch, "shapes must stay", strong=lambda inputs, _: inputs[..., 1:])
    with pytest.warns(UserWarning, match="nothing to compare"):
        build_learner("view-batch", {"views": 1})
    with pytest.warns(UserWarning, match="reach only 2 of 4"):
        learn("view-batch", stream, small_mlp(6), training=Training(2, 0.05, 16), runtime=cpu())
    domain = parse_stream("domain:permuted:2", stream[0].records)
    with pytest.raises(ModelMismatch, match="class, task"):
        learn("view-batch", domain, small_mlp(2), training=FOUR, runtime=cpu(), base="icarl")


def test_a_callable_augments_further_views_only(stream, small_mlp, cpu):
    seen = []

    def strong(inputs, generator):
        seen.append(len(inputs))
        return inputs.flip(-1)

    learn("view-batch", stream, small_mlp(6), training=FOUR, runtime=cpu(), base="lwf", strong=strong)
    assert set(seen) == {12}  # three of four slots of 16
