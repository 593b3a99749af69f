"""Digits with random labels."""

from __future__ import annotations

import numpy as np
import pytest

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.data import parse_data


def test_a_share_of_the_labels_is_drawn_anew_and_the_column_says_which_are_wrong():
    plain, noisy = pal.load_data("digits"), parse_data("noisy-digits:0.3", seed=1)
    assert noisy.ids == plain.ids
    changed = noisy.column("label") != plain.column("label")
    np.testing.assert_array_equal(noisy.column("mislabelled"), changed)
    assert changed.mean() == pytest.approx(0.27, abs=0.03)
    np.testing.assert_array_equal(noisy.tensors["label"].numpy(), noisy.column("label"))
    again = pal.load_data("noisy-digits", share=0.3, seed=1)
    np.testing.assert_array_equal(again.column("label"), noisy.column("label"))
    assert not pal.load_data("noisy-digits", share=0).column("mislabelled").any()


@pytest.mark.parametrize("share", [-0.1, 1.5, "many"])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(InvalidHyperparameter, match=r"\[0, 1\]"):
        pal.load_data("noisy-digits", share=share)
