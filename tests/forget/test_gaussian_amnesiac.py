"""Gaussian amnesiac unlearning, and the methods for every domain on regressions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tests.forget.measuring import changed, fingerprint
from tests.forget.regression_data import mae, random_images
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed, NonFinite
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget.regression import gaussian_amnesiac as module
from palimpsest.forget.regression.gaussian_amnesiac import GaussianAmnesiac, gaussian_targets
from palimpsest.models import build_model
from palimpsest.tasks.regression import Regression

TASK = Regression(loss="mae")


@pytest.fixture(scope="module")
def small():
    return build_model("small_cnn", (1, 8, 8), 1, seed=0, width=2, hidden=4), random_images(24, 1, 8)


def amnesiac(model, request, task=TASK, **settings):
    return pal.forget(model, request, "gaussian-amnesiac", task, **{"batch_size": 16, **settings})


def test_drawn_targets_have_the_mean_and_deviation_of_the_training_targets():
    truth = torch.tensor(np.random.default_rng(0).normal([50, -3], [12, 0.5], (4000, 2)))
    drawn = gaussian_targets(truth, 2000, torch.Generator().manual_seed(0)).numpy()
    deviation = truth.numpy().std(0, ddof=1)
    assert (np.abs(drawn.mean(0) - truth.numpy().mean(0)) < 3 * deviation / math.sqrt(2000)).all()
    assert (np.abs(drawn.std(0, ddof=1) - deviation) < 3 * deviation / math.sqrt(2 * 2000)).all()
    assert all(stats.shapiro(column[:500]).pvalue > 1e-3 for column in drawn.T)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.1


def spied(monkeypatch):
    """Batches as they were taught."""
    taught, real = [], module.relabelled

    def spy(batch, *rest):
        taught.append((batch, real(batch, *rest)))
        return taught[-1][1]

    monkeypatch.setattr(module, "relabelled", spy)
    return taught


@pytest.mark.parametrize("targets", [1, 2])
def test_targets_are_drawn_once_and_only_for_forget_records(monkeypatch, targets):
    request = random_images(24, 1, 8, targets=targets)
    taught = spied(monkeypatch)
    model = build_model("small_cnn", (1, 8, 8), targets, seed=0, width=2, hidden=4)
    amnesiac(model, request, epochs=3, validation=0.0, batch_size=10)
    gone = set(request.forget.ids)
    truth = TASK.all_targets(request.train)
    given: dict[str, set] = {}
    for before, after in taught:
        for row, name in enumerate(before["id"]):
            given.setdefault(name, set()).add(tuple(after["label"][row].tolist()))
    assert len(given) == 24 and all(len(values) == 1 for values in given.values())
    for name, [value] in given.items():
        same = np.allclose(value, truth[int(name)])
        assert same == (name not in gone)
    assert len({value for name in gone for value in given[name]}) == len(gone)


def test_the_distribution_is_that_of_all_training_targets_in_their_own_units(monkeypatch, small):
    model, request = small
    seen = []
    real = module.gaussian_targets
    monkeypatch.setattr(module, "gaussian_targets", lambda *a: seen.append(a) or real(*a))
    task = Regression(standardise=True).fitted(request.train)
    amnesiac(model, request, task)
    [(targets, count, _)] = seen
    assert count == 8 and sorted(targets[:, 0].tolist()) == sorted(
        request.train.column("label").astype(float)
    )


def test_with_one_epoch_every_retained_record_is_trained_on(monkeypatch, small):
    model, request = small
    taught = spied(monkeypatch)
    amnesiac(model, request)
    assert {name for before, _ in taught for name in before["id"]} == set(request.train.ids)


def test_the_epoch_that_is_best_on_retained_records_set_aside_is_kept(monkeypatch, small):
    model, request = small
    taught, losses, states = spied(monkeypatch), iter([3.0, 1.0, 2.0]), []
    asked = []

    def judged(student, records, task, runtime):
        states.append(fingerprint(student))
        asked.append(records.ids)
        return next(losses)

    monkeypatch.setattr(module, "mean_loss", judged)
    after = amnesiac(model, request, epochs=3, validation=0.25)
    assert fingerprint(after) == states[1] and len(set(states)) == 3
    trained = {name for before, _ in taught for name in before["id"]}
    assert asked[0] == asked[2] and len(asked[0]) == 4 and set(asked[0]) <= set(request.retain.ids)
    assert trained == set(request.train.ids) - set(asked[0])


def test_the_same_seed_gives_the_same_model_and_the_given_one_stays(small):
    model, request = small
    before = fingerprint(model)
    one, again, other = (amnesiac(model, request, Regression(), seed=seed, epochs=2) for seed in (0, 0, 1))
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)
    assert fingerprint(model) == before and not one.training


def test_constant_targets_have_no_distribution(small):
    model, request = small
    tensors = request.train.tensors
    records = pal.Records(TensorDataset(tensors["input"], torch.full((24,), 7.0)))
    flat = pal.ForgetSplit(records.select(range(8)), records.select(range(8, 24)))
    with pytest.raises(InvalidRecords, match="constant"):
        amnesiac(model, flat)


@pytest.mark.parametrize("side", [3, 15])
def test_targets_that_are_no_numbers_are_refused_on_either_side(small, side):
    model, request = small
    tensors = request.train.tensors
    y = tensors["label"].clone()
    y[side] = math.nan
    records = pal.Records(TensorDataset(tensors["input"], y))
    with pytest.raises(NonFinite, match=f"'{side}'"):
        amnesiac(model, pal.ForgetSplit(records.select(range(8)), records.select(range(8, 24))))


@pytest.mark.parametrize(
    "settings", [{"epochs": 0}, {"lr": -1.0}, {"validation": 1.0}, {"validation": -0.1}, {"batch_size": 1}]
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        GaussianAmnesiac(**settings)


def test_it_needs_the_retained_records(small):
    model, request = small
    with pytest.raises(MissingNeed, match="retain"):
        amnesiac(model, pal.ForgetSplit(request.forget))


# Every method that knows only the calls of a task


GENERAL = [
    name for name, cls in UNLEARNERS.items() if cls.card.tasks == ("any",) and "palimpsest." in cls.__module__
]
FAST = {"epochs": 1, "batch_size": 12, "lr": 1e-3}


def settings_of(name):
    known = UNLEARNERS.get(name).__dataclass_fields__
    if name == "retrain":
        return {"recipe": pal.TrainingRecipe(epochs=1, batch_size=12)}
    return {key: value for key, value in FAST.items() if key in known}


@pytest.mark.parametrize("name", [*GENERAL, "gaussian-amnesiac"])
@pytest.mark.parametrize("targets", [1, 2])
def test_methods_for_every_domain_run_on_regressions(name, targets):
    request = random_images(24, 1, 8, targets=targets)
    model = build_model("small_cnn", (1, 8, 8), targets, seed=0, width=2, hidden=4)
    before = fingerprint(model)
    after = pal.forget(
        model, request, name, Regression(standardise=True).fitted(request.train), **settings_of(name)
    )
    assert fingerprint(model) == before
    assert after(request.forget.tensors["input"]).shape == (8, targets)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["gaussian-amnesiac", "finetune", "neggrad-plus", "ssd", "retrain"])
def test_baselines_take_a_step_on_large_networks(name, method):
    pytest.importorskip(name.partition(":")[0])
    settings = {"img_size": 32, "patch_size": 16, "depth": 2} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 1, seed=0, **settings).eval()
    before = fingerprint(model)
    after = pal.forget(model, random_images(), method, TASK, **settings_of(method))
    assert fingerprint(model) == before and not after.training
    if method != "ssd":  # it may find nothing to dampen in random weights
        assert any(bool(moved.any()) for moved in changed(model, after).values())


def test_the_baselines_do_what_they_are_known_for():
    pytest.importorskip("sklearn")
    records = pal.load_data("diabetes")
    request = pal.split(records, pal.by_column("quarter", 1), seed=0)
    task = Regression(standardise=True).fitted(request.train)
    network = build_model("mlp", (10,), 1, seed=0, width=32)
    model = pal.train(network, request.train, task, epochs=40, seed=0, batch_size=32, lr=2e-3)
    before = mae(model, request.forget, task)
    shared = {"lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0}
    after = {
        "finetune": pal.forget(model, request, "finetune", task, epochs=3, **shared),
        "neggrad-plus": pal.forget(model, request, "neggrad-plus", task, beta=0.7, epochs=6, **shared),
        "retrain": pal.forget(model, request, "retrain", task, seed=1),
        "ssd": pal.forget(model, request, "ssd", task, alpha=1.5),
    }
    forget = {name: mae(changed_model, request.forget, task) for name, changed_model in after.items()}
    retain = {name: mae(changed_model, request.retain, task) for name, changed_model in after.items()}
    assert before < forget["finetune"] < forget["retrain"], forget
    assert forget["neggrad-plus"] > forget["finetune"], forget
    assert retain["finetune"] <= mae(model, request.retain, task) + 1.0
    dampened = changed(model, after["ssd"])
    assert (
        0 < sum(int(moved.sum()) for moved in dampened.values()) < sum(m.numel() for m in dampened.values())
    )
