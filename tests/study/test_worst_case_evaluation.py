"""Baselines and evaluation against direct computation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, UnknownName
from palimpsest.core.needs import Need
from palimpsest.core.unlearner import UNLEARNERS, Card
from palimpsest.models import build_model
from palimpsest.study.recipe import Method
from palimpsest.study.worst_case import BASELINES, Chooser, Evaluator, summary
from palimpsest.study.worst_case.baselines import el2n_scores, gradient_lengths, moderate_distance
from palimpsest.study.worst_case.evaluation import Scores, measure, settings_grid
from tests.forget.measuring import tensors_of

RUNTIME = pal.Runtime(seed=0, device="cpu")


@pytest.fixture(scope="module")
def blobs():
    """Training and test points in three overlapping classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(180) % 3
    x = 1.2 * torch.randn(3, 6, generator=generator)[labels] + torch.randn(180, 6, generator=generator)
    records = pal.Records(TensorDataset(x, labels))
    return records.select(range(120)), records.select(range(120, 180))


@pytest.fixture(scope="module")
def trained(blobs, digits_task):
    network = build_model("mlp", (6,), 3, seed=0, width=16)
    return pal.train(network, blobs[0], digits_task, epochs=20, lr=3e-3)


@pytest.fixture(scope="module")
def losses(blobs, trained):
    tensors = tensors_of(blobs[0])
    with torch.no_grad():
        return F.cross_entropy(trained(tensors["input"]), tensors["label"], reduction="none").numpy()


# Baselines


def test_the_lowest_losses_are_chosen(blobs, trained, losses, digits_task):
    ids = Chooser(trained, blobs[0], digits_task, 12).ids("lowest-loss")
    assert set(ids) == {blobs[0].ids[i] for i in np.argsort(losses)[:12]}


def test_classes_are_chosen_by_their_mean_loss(blobs, trained, losses, digits_task):
    labels = blobs[0].column("label")
    best = min(range(3), key=lambda label: losses[labels == label].mean())
    ids = Chooser(trained, blobs[0], digits_task, 1, "class").ids("lowest-loss")
    assert set(ids) == {i for i, label in zip(blobs[0].ids, labels, strict=True) if label == best}


def test_random_sets_differ_by_seed_alone(blobs, trained, digits_task):
    chooser = Chooser(trained, blobs[0], digits_task, 12)
    assert chooser.ids("random", 1) == chooser.ids("random", 1) != chooser.ids("random", 2)
    assert len(set(chooser.ids("random"))) == 12
    assert len(Chooser(trained, blobs[0], digits_task, 1, "class").ids("random")) == 40


def test_error_vectors_have_their_length():
    logits, labels = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 4
    errors = logits.softmax(1) - torch.eye(4)[labels]
    torch.testing.assert_close(el2n_scores(logits, labels), (errors**2).sum(1).sqrt())


@pytest.mark.parametrize("name", ["mlp", "small_resnet"])
def test_gradients_of_single_records_have_the_lengths_that_plain_backward_gives(digits_task, name):
    model = build_model(name, (1, 8, 8), 3, seed=0, width=4)
    records = pal.Records(TensorDataset(torch.rand(7, 1, 8, 8), torch.arange(7) % 3))
    found = gradient_lengths(model, RUNTIME.batches(records, digits_task, 4), digits_task, chunk=3)
    model.eval()
    for i in range(7):
        model.zero_grad()
        F.cross_entropy(model(tensors_of(records)["input"][i : i + 1]), torch.tensor([i % 3])).backward()
        truth = sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5
        assert found[i] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("name", ["el2n", "grand"])
def test_early_models_find_records_that_contradict_the_others_hard(blobs, digits_task, name):
    tensors = tensors_of(blobs[0])
    labels = tensors["label"].clone()
    labels[:12] = (labels[:12] + 1) % 3
    records = pal.Records(TensorDataset(tensors["input"], labels))
    network = build_model("mlp", (6,), 3, seed=0, width=16)
    recipe = pal.TrainingRecipe(epochs=100, lr=3e-3, batch_size=16)
    chooser = Chooser(network, records, digits_task, 60, recipe=recipe)
    kept = {int(i) for i in chooser.ids(name)}
    assert len(kept) == 60 and len(kept & set(range(12))) <= 2
    assert [len(chooser.early), chooser.early[0].training] == [3, False]


def test_the_moderate_set_are_both_ends_of_the_distances(blobs, trained, digits_task):
    tensors = tensors_of(blobs[0])
    with torch.no_grad():
        features = digits_task.features(trained, {**tensors, "id": blobs[0].ids}).double().numpy()
    order = np.argsort(moderate_distance(features, tensors["label"].numpy()), kind="stable")
    ids = {blobs[0].ids[i] for i in (*order[:6], *order[-7:])}
    assert set(Chooser(trained, blobs[0], digits_task, 13).ids("moderate")) == ids


def test_the_median_of_an_even_number_lies_between(blobs):
    distance = moderate_distance(np.array([[0.0], [1.0], [4.0], [9.0], [7.0]]), [0, 0, 0, 0, 1])
    assert distance.tolist() == [2.5, 1.5, 1.5, 6.5, 0.0]


def test_baselines_that_cannot_be_chosen_are_refused(blobs, trained, digits_task):
    with pytest.raises(UnknownName, match="lowest-loss"):
        Chooser(trained, blobs[0], digits_task, 12).ids("lowest-los")
    with pytest.raises(InvalidHyperparameter, match="not classes"):
        Chooser(trained, blobs[0], digits_task, 1, "class").ids("moderate")
    with pytest.raises(InvalidHyperparameter, match="size"):
        Chooser(trained, blobs[0], digits_task, 120).ids("random")
    bare = build_model("mlp", (6,), 3, seed=0, width=16)
    for name in ("el2n", "grand"):
        with pytest.raises(MissingNeed, match="how the original was trained"):
            Chooser(bare, blobs[0], digits_task, 12).ids(name)
    assert BASELINES == ("random", "lowest-loss", "el2n", "grand", "moderate")


# Evaluation


def test_the_four_shares_are_those_of_the_paper(blobs, trained, digits_task):
    train, test = blobs
    parts = pal.ForgetSplit(train.select(range(30)), train.select(range(30, 120)), test)
    found = measure(trained, parts, digits_task, RUNTIME)
    confidence, right = {}, {}
    for name, records in parts.parts.items():
        tensors = tensors_of(records)
        with torch.no_grad():
            probability = trained(tensors["input"]).double().softmax(1)
        confidence[name] = probability[torch.arange(len(records)), tensors["label"]].numpy()
        right[name] = (probability.argmax(1) == tensors["label"]).double().mean().item()
    assert (found.ua, found.ra, found.ta) == pytest.approx(
        (1 - right["forget"], right["retain"], right["test"])
    )
    assert found.forget_loss == pytest.approx(-np.log(confidence["forget"]).mean(), rel=1e-5)
    # as many retained as test records, so all 60 of the test and 60 of the 90 retained: which ones is drawn
    members = np.sort(RUNTIME.numpy("membership attack").permutation(90)[:60])
    inputs = np.concatenate([confidence["retain"][members], confidence["test"]])[:, None]
    machine = SVC(C=3, gamma="auto", kernel="rbf").fit(inputs, [1] * 60 + [0] * 60)
    assert found.mia == pytest.approx(1 - machine.predict(confidence["forget"][:, None]).mean(), abs=0.04)


def test_test_records_of_a_class_forgotten_as_a_whole_do_not_count(blobs, trained, digits_task):
    train, test = blobs
    gone = train.column("label") == 2
    found = measure(
        trained, pal.ForgetSplit(train.select(gone), train.select(~gone), test), digits_task, RUNTIME
    )
    kept = tensors_of(test.select(test.column("label") != 2))
    with torch.no_grad():
        right = (trained(kept["input"]).argmax(1) == kept["label"]).double().mean().item()
    assert found.ta == pytest.approx(right)


def test_the_average_gap_is_the_mean_of_four_distances():
    one, two = Scores(0.1, 0.2, 0.9, 0.8, 3.0), Scores(0.2, 0.0, 1.0, 0.9, 9.0)
    assert one.gap(two) == two.gap(one) == pytest.approx((0.1 + 0.2 + 0.1 + 0.1) / 4)
    assert one.gap(one) == 0


@dataclass(frozen=True)
class Shrunk:
    """Weights times a factor; counts its calls."""

    card = Card("shrunk-in-evaluation", "", frozenset({Need.MODEL}), ("any",), None)
    calls: ClassVar[list] = []
    factor: float = 1.0
    note: str = field(default="")

    def unlearn(self, model, split, task, runtime):
        self.calls.append((self.factor, len(split.forget)))
        after = build_model("mlp", (6,), 3, width=16)
        after.load_state_dict({name: self.factor * value for name, value in model.state_dict().items()})
        return after


@pytest.fixture
def shrunk():
    UNLEARNERS.register(Shrunk.card.name)(Shrunk)
    Shrunk.calls.clear()
    yield Shrunk.card.name
    del UNLEARNERS._entries[Shrunk.card.name]


def test_candidates_are_chosen_on_the_random_set_and_used_on_every_other(blobs, trained, digits_task, shrunk):
    method = Method(name=shrunk, settings={"factor": [0.0, 1.0], "note": "x"})
    evaluator = Evaluator(trained, *blobs, digits_task, [method], RUNTIME)
    random = [list(blobs[0].ids[:12]), list(blobs[0].ids[12:24])]
    sets = {"hardest": [list(blobs[0].ids[24:36])], "random": random}
    kept = []
    rows = evaluator.rows(sets, seeds=2, keep=lambda rows: kept.append(len(rows)))
    tried = [row for row in rows if row["method"] == shrunk]
    first = [row for row in tried if row["set"] == "random" and row["seed"] == 0]
    best = min(first, key=lambda row: row["gap"])["settings"]
    assert {row["settings"]["factor"] for row in first} == {0.0, 1.0}
    assert best == {"factor": 1.0, "note": "x"}  # weights of zero predict one class
    assert all(row["settings"] == best for row in tried if row not in first)
    assert [row["chosen"] for row in first] == [False, True]
    table = {(row["set"], row["method"]): row for row in summary(rows)}
    assert len(table) == 4 and all(row["seeds"] == 2 for row in table.values())
    control = [row for row in rows if row["method"] == "retrain" and row["set"] == "random"]
    mean = np.mean([row["ua"] for row in control])
    assert table["random", "retrain"]["ua"] == pytest.approx(mean)
    assert table["random", "retrain"]["ua_spread"] == pytest.approx(np.std([row["ua"] for row in control]))
    assert len({row["ua"] for row in control}) > 1 or control[0]["forget_loss"] != control[1]["forget_loss"]
    assert kept == sorted(kept) and kept[-1] == len(rows)


def test_rows_of_an_earlier_run_are_not_computed_again(blobs, trained, digits_task, shrunk):
    evaluator = Evaluator(trained, *blobs, digits_task, [Method(name=shrunk)], RUNTIME)
    sets = {"random": [list(blobs[0].ids[:12])]}
    rows = evaluator.rows(sets)
    assert len(Shrunk.calls) == 1
    assert evaluator.rows(sets, known=rows) == rows and len(Shrunk.calls) == 1
    evaluator.rows({"random": [list(blobs[0].ids[1:13])]}, known=rows)
    assert len(Shrunk.calls) == 2


def test_the_gap_of_a_row_is_to_retraining_on_the_same_set_and_seed(blobs, trained, digits_task, shrunk):
    evaluator = Evaluator(trained, *blobs, digits_task, [Method(name=shrunk)], RUNTIME)
    control, row = evaluator.rows({"random": [list(blobs[0].ids[:12])]})
    distances = [abs(control[key] - row[key]) for key in ("ua", "mia", "ra", "ta")]
    assert row["gap"] == pytest.approx(np.mean(distances)) and control["gap"] == 0


def test_what_cannot_be_evaluated_is_refused_before_any_work(blobs, trained, digits_task, shrunk):
    train, test = blobs
    bare = build_model("mlp", (6,), 3, seed=0, width=16)
    with pytest.raises(MissingNeed, match="how it was trained"):
        Evaluator(bare, train, test, digits_task).check(["random"])
    Evaluator(bare, train, test, digits_task, recipe=pal.TrainingRecipe(epochs=1)).check(["random"])
    candidates = [Method(name=shrunk, settings={"factor": [1.0, 2.0]})]
    with pytest.raises(InvalidHyperparameter, match="keep the baseline 'random'"):
        Evaluator(trained, train, test, digits_task, candidates).check(["lowest-loss"])
    for method in (Method(name="finetun"), Method(name="finetune", settings={"lrr": 1})):
        with pytest.raises(UnknownName):
            Evaluator(trained, train, test, digits_task, [method]).check(["random"])
    with pytest.raises(InvalidHyperparameter, match="empty"):
        settings_grid(Method(name=shrunk, settings={"factor": []}))
    with pytest.raises(MissingNeed, match="test records"):
        measure(trained, pal.ForgetSplit(train.select([0]), train.select([1, 2])), digits_task, RUNTIME)
