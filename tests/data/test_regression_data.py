"""Real data with numbers as targets."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_diabetes

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency
from palimpsest.data import load_data, parse_data
from palimpsest.data.digits_regression import turned as turned_by
from palimpsest.data.tables import quarters


def test_diabetes_is_scikit_learns_with_features_of_deviation_one():
    records = load_data("diabetes")
    x, y = load_diabetes(return_X_y=True)
    inputs = np.stack([records[index]["input"].numpy() for index in range(442)])
    assert np.allclose(inputs, x * np.sqrt(442), atol=1e-3)
    assert np.array_equal(records.column("label"), y.astype(np.float32))
    assert set(records.column("sex")) == {1, 2} and records.column("age").max() == 79
    assert records.ids[3] == "patient-003"


def test_auto_mpg_has_real_cars_without_their_names():
    pytest.importorskip("mlxtend")
    records = load_data("auto-mpg")
    assert len(records) == 392 and records[0]["input"].shape == (9,)
    assert records.column("label").min() == 9 and records.column("label").max() == pytest.approx(46.6)
    inputs = np.stack([records[index]["input"].numpy() for index in range(392)])
    assert np.allclose(inputs.mean(0), 0, atol=1e-5) and np.allclose(inputs.std(0), 1, atol=1e-3)
    miles, weight = records.column("label"), inputs[:, 3]
    assert np.corrcoef(miles, weight)[0, 1] < -0.8  # heavy cars go fewer miles
    assert np.bincount(records.column("origin")).tolist() == [0, 245, 68, 79]


def test_without_mlxtend_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingDependency, match=r"palimpsest-ml\[data\]"):
        load_data("auto-mpg")


def test_the_value_and_the_ink_of_a_digit_are_what_they_say(digits):
    value, ink = load_data("digits-regression"), parse_data("digits-regression:ink")
    assert np.array_equal(value.column("label"), digits.column("label")) and value.ids == digits.ids
    assert value.column("label").dtype.kind == "f"
    for index in (0, 400, 1796):
        assert ink.column("label")[index] == pytest.approx(float(digits[index]["input"].sum()), rel=1e-5)
        assert ink.column("digit")[index] == int(digits[index]["label"])


def test_a_digit_is_turned_by_its_target_counter_clockwise(digits):
    turned = load_data("digits-regression", target="angle", seed=3)
    angles = turned.column("label")
    assert abs(angles).max() <= 45 and abs(angles.mean()) < 2
    steepest = int(angles.argmax())
    assert angles[steepest] > 40

    def overlap(angle):
        plain = ndimage.zoom(digits[steepest]["input"][0].numpy(), 2, order=1)
        again = ndimage.rotate(plain, angle, reshape=False, order=1).clip(0, 1)
        return float(np.abs(again - turned[steepest]["input"][0].numpy()).mean())

    assert overlap(float(angles[steepest])) < 0.01 < 0.1 < overlap(-float(angles[steepest]))
    image = digits[steepest]["input"].numpy()
    assert np.allclose(turned_by(image, 90.0)[0], np.rot90(turned_by(image, 0.0)[0]), atol=1e-5)


def test_the_seed_draws_the_angles():
    one, again, other = (
        load_data("digits-regression", target="angle", seed=s).column("label") for s in (0, 0, 1)
    )
    assert np.array_equal(one, again) and not np.allclose(one, other)


def test_another_target_is_refused():
    with pytest.raises(InvalidHyperparameter, match="'value', 'angle' or 'ink'"):
        parse_data("digits-regression:width")
    with pytest.raises(InvalidHyperparameter, match="most"):
        load_data("digits-regression", target="angle", most=0)


def test_quarters_hold_a_quarter_each_and_keep_equal_targets_together():
    assert np.bincount(quarters(np.arange(100.0))).tolist() == [0, 25, 25, 25, 25]
    values = np.array([1.0] * 60 + [2.0] * 40)
    assert len(set(zip(values, quarters(values), strict=True))) == 2
