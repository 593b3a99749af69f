"""Blindspot unlearning against brute force, and on the digits as numbers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from tests.forget.measuring import fingerprint
from tests.forget.regression_data import mae, predicted, random_images
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    InvalidSplit,
    MissingNeed,
    ModelMismatch,
    NonFinite,
    UnknownName,
)
from palimpsest.forget.regression import blindspot as module
from palimpsest.forget.regression.blindspot import (
    Blindspot,
    as_mask,
    attention_difference,
    attention_map,
    batch_loss,
    forget_loss,
)
from palimpsest.models import build_model
from palimpsest.tasks.regression import Regression

TASK = Regression(loss="mae")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The losses, against loops


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 7, 5)])
def test_an_attention_map_is_the_normalised_mean_square_over_axis_one(shape):
    a = drawn(*shape)
    found = attention_map(a)
    for row in range(len(a)):
        flat = np.array(
            [
                np.mean([float(a[(row, c, *where)]) ** 2 for c in range(shape[1])])
                for where in np.ndindex(*shape[2:])
            ]
        )
        np.testing.assert_allclose(found[row].numpy(), flat / math.sqrt((flat**2).sum()))


def test_an_activation_of_zeros_has_a_map_of_zeros():
    assert attention_map(torch.zeros(2, 3, 4, 4)).tolist() == torch.zeros(2, 16).tolist()


def test_a_flat_activation_collapses_and_an_axis_before_it_is_the_extension():
    a, b = drawn(5, 6), drawn(5, 6, seed=1)
    assert torch.equal(attention_map(a), torch.ones(5, 1, dtype=a.dtype)) and attention_difference(a, b) == 0
    squares = a.square() / a.square().norm(dim=1, keepdim=True)
    torch.testing.assert_close(attention_map(a.unsqueeze(1)), squares)


@pytest.mark.parametrize("loss", ["mae", "mse", "huber"])
@pytest.mark.parametrize("flags", [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_a_batch_weighs_its_two_kinds_by_their_shares_and_leaves_out_one_that_is_not_there(loss, flags):
    task, mask = Regression(loss=loss), torch.tensor(flags)
    given, taught, y = drawn(5, 2), drawn(5, 2, seed=1), drawn(5, 2, seed=2)
    mine, theirs = [drawn(5, 3, 2, 2), drawn(5, 4, 3)], [drawn(5, 3, 2, 2, seed=3), drawn(5, 4, 3, seed=4)]

    def error(a, b):
        e = abs(float(a - b))
        return {"mae": e, "mse": e * e, "huber": 0.5 * e * e if e < 1 else e - 0.5}[loss]

    def mean(rows, other):
        return np.mean([error(given[i, j], other[i, j]) for i in rows for j in range(2)])

    gone, kept = [i for i in range(5) if flags[i]], [i for i in range(5) if not flags[i]]
    expected = 0.0
    if gone:
        maps = [(attention_map(a[gone]), attention_map(b[gone])) for a, b in zip(mine, theirs, strict=True)]
        attention = sum(float(((a - b) ** 2).mean()) for a, b in maps)
        expected += len(gone) / 5 * (mean(gone, taught) + 50 * attention)
    if kept:
        expected += len(kept) / 5 * mean(kept, y)
    losses = task.loss_of_logits(given, {"label": y})
    found = batch_loss(given, taught, mine, theirs, losses, mask, 50.0, task.distance)
    assert found.item() == pytest.approx(expected)


def test_targets_of_forget_rows_do_not_count():
    given, taught = drawn(4, 1), drawn(4, 1, seed=1)
    mask, losses = torch.tensor([1, 0, 0, 1]), torch.tensor([math.nan, 1.0, 2.0, math.nan]).double()
    found = batch_loss(given, taught, [], [], losses, mask, 0.0, TASK.distance)
    expected = 0.5 * (given - taught)[[0, 3]].abs().mean() + 0.5 * 1.5
    torch.testing.assert_close(found, expected)


def test_what_cannot_be_compared_is_refused():
    out = drawn(3, 1)
    with pytest.raises(ModelMismatch, match="2 activations, the blindspot model 1"):
        forget_loss(out, out, [drawn(3, 2, 2), drawn(3, 2, 2)], [drawn(3, 2, 2)], 1.0, TASK.distance)
    with pytest.raises(ModelMismatch, match="0 activations"):
        forget_loss(out, out, [], [], 1.0, TASK.distance)
    with pytest.raises(ModelMismatch, match="cannot be compared"):
        attention_difference(drawn(3, 2, 2), drawn(3, 2, 3))
    with pytest.raises(ModelMismatch, match="cannot be compared"):
        TASK.distance(drawn(3, 1), drawn(3))
    for flags in (torch.tensor([0, 2, 1]), torch.tensor([0.5, 0, 1])):
        with pytest.raises(InvalidSplit, match="0 or 1"):
            as_mask(flags, 3)
    with pytest.raises(InvalidSplit, match="one forget flag per record"):
        as_mask(torch.tensor([0, 1]), 3)


# The method


@pytest.fixture(scope="module")
def small():
    return build_model("small_cnn", (1, 8, 8), 1, seed=0, width=2, hidden=4), random_images(24, 1, 8)


def blindspot(model, request, task=TASK, **settings):
    return pal.forget(model, request, "blindspot", task, **{"batch_size": 16, **settings})


def test_the_blindspot_model_trains_as_told_and_never_on_a_forget_record(small, monkeypatch):
    model, request = small
    seen = []

    def spy(network, records, task, runtime, recipe):
        seen.append((records.ids, recipe.epochs, recipe.lr, recipe.optimizer, fingerprint(network)))
        return real(network, records, task, runtime, recipe)

    real = module.fit
    monkeypatch.setattr(module, "fit", spy)
    blindspot(model, request, blindspot_epochs=3, blindspot_lr=0.02)
    [(ids, epochs, lr, optimizer, start)] = seen
    assert ids == request.retain.ids and not set(ids) & set(request.forget.ids)
    assert (epochs, lr, optimizer) == (3, 0.02, "adam") and start != fingerprint(model)


def test_one_batch_is_one_step_of_adam_on_the_batch_loss(small):
    model, request = small
    runtime = pal.Runtime(seed=0, device="cpu")
    after = Blindspot(batch_size=100).unlearn(model, request, TASK, runtime)
    fresh = module.fit(
        module.reinitialised(model, runtime),
        request.retain,
        TASK,
        runtime,
        Blindspot(batch_size=100).blindspot_recipe,
    )
    by_hand = copy.deepcopy(model).train()
    records = request.train
    batch = records.batch(range(len(records)), TASK.collate)
    gone = torch.tensor([name in set(request.forget.ids) for name in batch["id"]])
    inputs, y, maps = batch["input"], batch["label"], []
    for network in (by_hand, fresh):
        one = network.conv1(inputs)
        two = network.conv2(torch.max_pool2d(one.relu(), 2))
        flat = network.fc(torch.max_pool2d(two.relu(), 2).flatten(1))
        maps.append([a[gone] for a in (one, two, flat.unsqueeze(1))])
    out, taught = by_hand(inputs), fresh(inputs).detach()
    attention = sum(attention_difference(a, b.detach()) for a, b in zip(*maps, strict=True))
    q = 8 / 24
    loss = q * ((out - taught)[gone].abs().mean() + 50 * attention)
    loss = loss + (1 - q) * (out[:, 0] - y)[~gone].abs().mean()
    optimizer = torch.optim.Adam(by_hand.parameters(), 1e-3)
    loss.backward()
    optimizer.step()
    for mine, theirs in zip(by_hand.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_the_targets_of_the_forget_records_are_not_needed(small):
    model, request = small
    tensors = request.train.tensors
    blank = tensors["label"].clone()
    blank[:8] = math.nan
    records = pal.Records(TensorDataset(tensors["input"], blank))
    without = pal.ForgetSplit(records.select(range(8)), records.select(range(8, 24)))
    assert fingerprint(blindspot(model, without)) == fingerprint(blindspot(model, request))


def test_the_same_seed_gives_the_same_model_and_the_given_one_stays(small):
    model, request = small
    before = fingerprint(model)
    one, again, other = (blindspot(model, request, seed=seed) for seed in (0, 0, 1))
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)
    assert fingerprint(model) == before and not one.training
    assert all(parameter.requires_grad for parameter in one.parameters())


def test_flat_activations_count_unless_as_released():
    x, y = drawn(30, 4).float(), drawn(30, seed=1).float() + 3
    records = pal.Records(TensorDataset(x, y))
    request = pal.ForgetSplit(records.select(range(10)), records.select(range(10, 30)))
    model = build_model("mlp", (4,), 1, seed=0, width=8)
    plain, extended, released = (
        blindspot(model, request, **settings)
        for settings in ({"at_beta": 0.0}, {"at_beta": 50.0}, {"at_beta": 50.0, "as_released": True})
    )

    def apart(one, other):
        return max(
            (a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True)
        )

    assert apart(plain, extended) > 1e-4 and apart(plain, released) < 1e-6


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("targets", [1, 2])
def test_large_networks_with_batch_norm_or_attention_take_a_step(name, targets):
    pytest.importorskip(name.partition(":")[0])
    settings = {"img_size": 32, "patch_size": 16, "depth": 2} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), targets, seed=0, **settings).eval()
    request = random_images(targets=targets)
    before = fingerprint(model)
    after = blindspot(model, request, batch_size=12, blindspot_epochs=1, blindspot_lr=1e-3)
    assert fingerprint(model) == before != fingerprint(after)
    statistics = [key for key in after.state_dict() if key.endswith("running_mean")]
    moved = [not torch.equal(after.state_dict()[key], model.state_dict()[key]) for key in statistics]
    assert all(moved) and len(moved) == (20 if "resnet" in name else 0)  # they move with forget images too


class Alone(nn.Linear):
    """A head and nothing before it."""


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"at_beta": -1.0}, InvalidHyperparameter, "at_beta"),
        ({"at_beta": math.inf}, InvalidHyperparameter, "at_beta"),
        ({"epochs": 0}, InvalidHyperparameter, "at least 1"),
        ({"blindspot_epochs": 0}, InvalidHyperparameter, "blindspot_epochs"),
        ({"batch_size": 1}, InvalidHyperparameter, "batch_size"),
        ({"lr": 0.0}, InvalidHyperparameter, "lr"),
        ({"layers": ("conv9",)}, UnknownName, "conv"),
        ({"layers": ()}, ModelMismatch, "shows no activations"),
    ],
)
def test_bad_settings_are_refused(small, settings, error, said):
    model, request = small
    with pytest.raises(error, match=said):
        blindspot(model, request, **settings)


def test_a_model_without_activations_is_refused_unless_attention_is_off():
    records = pal.Records(TensorDataset(drawn(20, 3).float(), drawn(20, seed=1).float()))
    request = pal.ForgetSplit(records.select(range(6)), records.select(range(6, 20)))
    model = Alone(3, 1)
    with pytest.raises(ModelMismatch, match="at_beta=0"):
        blindspot(model, request)
    assert fingerprint(blindspot(model, request, at_beta=0.0)) != fingerprint(model)


def test_classifiers_classes_and_missing_records_are_refused(small, digits_model, digits_task, class_request):
    model, request = small
    with pytest.raises(ModelMismatch, match="works for regression, not for classification"):
        pal.forget(digits_model, class_request, "blindspot", digits_task)
    with pytest.raises(InvalidLabels, match="Classification"):
        blindspot(digits_model, class_request)
    with pytest.raises(MissingNeed, match="retain"):
        blindspot(model, pal.ForgetSplit(request.forget))
    tensors = request.train.tensors
    bad = tensors["label"].clone()
    bad[20] = math.nan
    records = pal.Records(TensorDataset(tensors["input"], bad))
    with pytest.raises(NonFinite, match="'20'"):
        blindspot(model, pal.ForgetSplit(records.select(range(8)), records.select(range(8, 24))))


# On the digits as numbers (card: forget the values up to 2)


@pytest.fixture(scope="module")
def values():
    records = pal.load_data("digits-regression")
    request = pal.split(records, pal.by_range("label", high=2), seed=0)
    network = build_model("small_cnn", (1, 8, 8), 1, seed=0)
    model = pal.train(network, request.train, TASK, epochs=20, seed=0)
    return model, pal.forget(model, request, "retrain", TASK, seed=1), request


def test_it_comes_closer_to_retraining_than_fine_tuning_and_random_targets(values):
    model, retrained, request = values
    gold = predicted(retrained, request.forget, TASK)
    shared = {"epochs": 3, "batch_size": 64}
    unlearned = {
        "blindspot": blindspot(model, request, **shared),
        "finetune": pal.forget(
            model, request, "finetune", TASK, lr=1e-3, optimizer="adam", weight_decay=0.0, **shared
        ),
        "gaussian-amnesiac": pal.forget(model, request, "gaussian-amnesiac", TASK, **shared),
    }
    w1 = {
        name: wasserstein_distance(predicted(after, request.forget, TASK), gold)
        for name, after in unlearned.items()
    }
    assert w1["blindspot"] <= 0.3 * w1["finetune"] and w1["blindspot"] <= 0.5 * w1["gaussian-amnesiac"], w1
    error = {name: mae(after, request.forget, TASK) for name, after in unlearned.items()}
    assert (
        mae(model, request.forget, TASK) < error["finetune"] < error["gaussian-amnesiac"] < error["blindspot"]
    )
    assert error["blindspot"] <= mae(retrained, request.forget, TASK) + 0.5
    kept = request.test.select(request.test.column("label") > 2)
    assert mae(unlearned["blindspot"], kept, TASK) <= mae(model, kept, TASK) + 0.3


def test_attention_brings_the_maps_closer_to_the_blindspot_models(values):
    model, _, request = values
    runtime = pal.Runtime(seed=0)
    method = Blindspot(epochs=3, batch_size=64)
    fresh = module.fit(
        module.reinitialised(model, runtime), request.retain, TASK, runtime, method.blindspot_recipe
    )
    x = request.forget.tensors["input"]

    @torch.no_grad()
    def difference(network):
        return float(attention_difference(network.conv2(torch.max_pool2d(network.conv1(x).relu(), 2)),
                                          fresh.conv2(torch.max_pool2d(fresh.conv1(x).relu(), 2))))  # fmt: skip

    heavy, light = (
        difference(Blindspot(at_beta=beta, epochs=3, batch_size=64).unlearn(model, request, TASK, runtime))
        for beta in (200.0, 0.0)
    )
    assert heavy < light
