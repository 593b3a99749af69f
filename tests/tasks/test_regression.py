"""Regression as a domain: shapes, units, losses, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    InvalidRecords,
    ModelMismatch,
    NonFinite,
    UnknownName,
)
from palimpsest.models import build_model
from palimpsest.tasks import build_task
from palimpsest.tasks.regression import Regression, pinball


class Head(nn.Module):
    """A linear layer that gives [batch], [batch, 1] or [batch, k]."""

    def __init__(self, columns: int, flat: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.flat = nn.Linear(3, columns), flat

    def forward(self, x):
        return self.linear(x)[:, 0] if self.flat else self.linear(x)


def table(y, n=20, ids=None):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return pal.Records(TensorDataset(x, torch.as_tensor(y)), ids=ids)


def whole(records, task):
    return records.batch(range(len(records)), task.collate)


def target(n=20, k=None):
    shape = (n,) if k is None else (n, k)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 10 + 50


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_targets_and_outputs_of_one_column_meet_row_by_row(flat, column, loss):
    y = target()
    records, task = table(y[:, None] if column else y), Regression(loss=loss, delta=2.0)
    model = Head(1, flat)
    task.check(model, records)
    batch = whole(records, task)
    given = model.linear(batch["input"])[:, 0]
    truth = {
        "mse": (given - y) ** 2,
        "mae": (given - y).abs(),
        "huber": torch.where((given - y).abs() < 2, 0.5 * (given - y) ** 2, 2 * ((given - y).abs() - 1)),
    }[loss]
    assert task.logits(model, batch).shape == (20, 1)
    torch.testing.assert_close(task.loss_per_example(model, batch), truth)


def test_several_targets_are_averaged_per_example():
    y = target(k=3)
    records, task = table(y), Regression(loss="mae")
    model = Head(3)
    task.check(model, records)
    batch = whole(records, task)
    assert task.outputs(records) == 3
    torch.testing.assert_close(task.loss_per_example(model, batch), (model(batch["input"]) - y).abs().mean(1))


def test_standardising_takes_mean_and_deviation_of_the_training_targets_and_changes_units_only():
    y = target(k=2).double()
    records = table(y)
    task = Regression(loss="mae", standardise=True).fitted(records)
    assert np.allclose(task.center, y.numpy().mean(0))
    assert np.allclose(task.scale, y.numpy().std(0, ddof=1))
    model, batch = Head(2).double(), {**whole(records, Regression()), "input": torch.randn(20, 3).double()}
    outputs = task.logits(model, batch)
    answered = task.predictions(outputs)
    torch.testing.assert_close(answered, torch.tensor(task.center) + torch.tensor(task.scale) * outputs)
    error = ((answered - y).abs() / torch.tensor(task.scale)).mean(1)
    torch.testing.assert_close(task.loss_of_logits(outputs, batch), error)
    assert task.fitted(records) is task


def test_the_quantile_loss_is_least_at_the_quantile():
    y = torch.arange(101.0)[:, None]
    for q in (0.1, 0.5, 0.8):
        losses = [float(pinball(torch.full((101, 1), float(c)), y, (q,)).mean()) for c in range(101)]
        assert abs(int(np.argmin(losses)) - 100 * q) <= 1


def test_quantiles_have_an_output_each_and_predict_by_the_median():
    records = table(target())
    task = Regression(loss="quantile", quantiles=(0.1, 0.5, 0.9), center=10.0, scale=2.0)
    assert task.outputs(records) == 3
    model = Head(3)
    task.check(model, records)
    outputs = task.logits(model, whole(records, task))
    torch.testing.assert_close(task.predictions(outputs), 10 + 2 * outputs[:, 1:2])
    with pytest.raises(ModelMismatch, match="1 outputs for 3"):
        task.check(Head(1), records)


def test_a_network_learns_a_table_and_an_image(digits):
    for name, net, task in (
        ("diabetes", build_model("mlp", (10,), 1, width=32), Regression(standardise=True)),
        (
            "digits-regression:ink",
            build_model("small_cnn", (1, 8, 8), 1, width=4),
            Regression(standardise=True),
        ),
    ):
        from palimpsest.data import parse_data

        records = parse_data(name)
        fitted = task.fitted(records)
        model = pal.train(net, records, fitted, epochs=5, lr=3e-3)
        loss = fitted.loss_per_example(model, whole(records, fitted)).mean()
        assert loss.item() < 0.75  # always answering the mean gives 1


def test_features_are_the_input_of_the_head_and_are_observed_in_the_same_pass():
    records = table(target())
    model, task = build_model("mlp", (3,), 1, width=8), Regression()
    batch = whole(records, task)
    seen = task.observe(model, batch)
    assert seen.features.shape == (20, 8) and seen.logits.shape == (20, 1)
    torch.testing.assert_close(task.features(model, batch).detach(), seen.features)
    torch.testing.assert_close(
        seen.loss, F.mse_loss(seen.logits, batch["label"][:, None], reduction="none")[:, 0]
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_labels_of_classes_are_refused_with_advice(dtype):
    records = table((torch.arange(20) % 3).to(dtype))
    with pytest.raises(InvalidLabels, match="Classification"):
        Regression().check(Head(1), records)


def test_the_logits_of_a_classifier_are_refused_with_advice():
    with pytest.raises(ModelMismatch, match=r"10 outputs for 1 targets.*Classification"):
        Regression().check(Head(10), table(target()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_targets_that_are_not_finite_are_named(bad):
    y = target()
    y[7] = bad
    with pytest.raises(NonFinite, match="1 records hold NaN or Inf as target: 'row-7'"):
        Regression().check(Head(1), table(y, ids=[f"row-{index}" for index in range(20)]))


def test_inputs_that_are_not_finite_are_named():
    x = torch.zeros(20, 3)
    x[4, 1] = float("nan")
    with pytest.raises(NonFinite, match="'4'"):
        Regression().check(Head(1), pal.Records(TensorDataset(x, target())))


class Words(Dataset):
    """Items that do not lie in memory as tensors."""

    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 12

    def __getitem__(self, item):
        return {"input": torch.ones(3) * item, "label": self.label}


@pytest.mark.parametrize(
    ("label", "error", "said"),
    [
        ("high", InvalidLabels, "must be numbers"),
        (3, InvalidLabels, "Classification"),
        (float("nan"), NonFinite, "12 records"),
        (2.5, None, ""),
        (np.array([1.0, 2.0]), ModelMismatch, "1 outputs for 2 targets"),
    ],
)
def test_targets_that_are_read_one_by_one_are_checked_too(label, error, said):
    records = pal.Records(Words(label))
    if error is None:
        Regression().check(Head(1), records)
        assert Regression().all_targets(records).tolist() == [[2.5]] * 12
        return
    with pytest.raises(error, match=said):
        Regression().check(Head(1), records)


@pytest.mark.parametrize(
    ("task", "said"),
    [(Regression(label="age"), r"Regression\(label="), (Regression(input="image"), r"Regression\(input=")],
)
def test_fields_that_are_not_there_are_named(task, said):
    with pytest.raises((InvalidLabels, ModelMismatch), match=said):
        task.check(Head(1), table(target()))


def test_outputs_of_another_shape_or_nan_are_refused():
    records = table(target())

    class Square(nn.Module):
        def forward(self, x):
            return x[:, :, None] * x[:, None, :]

    class Nothing(nn.Module):
        def forward(self, x):
            return x[:, 0] * float("nan")

    with pytest.raises(ModelMismatch, match=r"\(8, 3, 3\)"):
        Regression().check(Square(), records)
    with pytest.raises(ModelMismatch, match="NaN"):
        Regression().check(Nothing(), records)
    with pytest.raises(ModelMismatch, match="fails on a batch"):
        Regression().check(nn.Linear(5, 1), records)


def test_constant_targets_have_no_scale():
    with pytest.raises(InvalidRecords, match="constant"):
        Regression(standardise=True).fitted(table(torch.full((20,), 3.0)))


def test_a_task_that_was_not_fitted_says_so():
    with pytest.raises(InvalidHyperparameter, match="fitted"):
        Regression(standardise=True).check(Head(1), table(target()))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "mean"},
        {"scale": 0.0},
        {"scale": (1.0, -1.0)},
        {"center": float("nan")},
        {"delta": 0.0},
        {"loss": "quantile"},
        {"quantiles": (0.5,)},
        {"loss": "quantile", "quantiles": (0.9, 0.1)},
        {"loss": "quantile", "quantiles": (0.0, 0.5)},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        Regression(**settings)


def test_a_scale_for_another_number_of_targets_is_refused():
    with pytest.raises(ModelMismatch, match="scale has 3 values for 1 targets"):
        Regression(scale=(1.0, 1.0, 1.0)).check(Head(1), table(target()))


def test_tasks_are_built_by_name():
    records = table(target())
    task = build_task("regression", {"loss": "mae", "standardise": True}, records)
    assert isinstance(task, Regression) and task.scale == pytest.approx(float(target().std()))
    assert build_task("classification", {}, records).name == "classification"
    with pytest.raises(UnknownName, match="Did you mean 'regression'"):
        build_task("regresion", {}, records)
    with pytest.raises(UnknownName, match="Did you mean 'loss'"):
        build_task("regression", {"los": "mae"}, records)


# Requests


def test_real_numbers_are_no_classes_and_are_drawn_along_their_values():
    y = torch.linspace(0, 1, 200)
    parts = pal.split(table(y, 200), pal.by_range("label", high=0.3), test=0.25, holdout=0.25)
    assert parts.forgotten_labels == [] and not parts.like_forgotten(parts.test).any()
    assert parts.forget.column("label").max() <= 0.3 < parts.retain.column("label").min()
    assert (
        abs(parts.test.column("label").mean() - 0.5) < 0.02 > abs(parts.holdout.column("label").mean() - 0.5)
    )
    several = pal.split(table(target(k=2)), pal.by_fraction(0.2))
    assert several.forgotten_labels == [] and len(several.forget) == round(0.2 * len(several.train))


def test_a_range_names_its_bounds_and_refuses_what_it_cannot_find():
    records = table(target()).with_column("name", ["a"] * 20)
    assert pal.by_range("label", 40, 60).description == "40 <= label <= 60"
    assert pal.by_range("label", low=40).description == "label >= 40"
    for rule, error, said in (
        (pal.by_range("label", 500), pal.PalimpsestError, "No record has label"),
        (pal.by_range("name", 0, 1), pal.PalimpsestError, "no single numbers"),
    ):
        with pytest.raises(error, match=said):
            pal.split(records, rule)
    with pytest.raises(pal.PalimpsestError, match="from low to high"):
        pal.by_range("label", 2, 1)
