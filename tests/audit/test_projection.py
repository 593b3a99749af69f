"""The plane of the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from palimpsest.audit.projection import principal_plane, sample_by_group, turned_towards
from palimpsest.core.errors import InvalidAudit


def normal(seed: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.integers(5, 40), st.integers(2, 12))
def test_the_plane_is_that_of_principal_components(seed, rows, width):
    x = normal(seed, rows, width)
    points, share = principal_plane(x)
    judge = PCA(2, svd_solver="full").fit(x.numpy())
    expected = judge.transform(x.numpy())
    expected /= np.sqrt((expected**2).sum(1).mean())
    assert np.abs(points.numpy()) == pytest.approx(np.abs(expected), abs=1e-6)
    assert share == pytest.approx(judge.explained_variance_ratio_.sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.floats(0, 6.3), st.booleans())
def test_a_turned_or_mirrored_picture_is_turned_back(seed, angle, mirrored):
    target = normal(seed, 20, 2)
    c, s = np.cos(angle), np.sin(angle)
    turn = (
        torch.tensor([[c, -s], [s, c]]) @ torch.diag(torch.tensor([1.0, -1.0 if mirrored else 1.0])).double()
    )
    assert turned_towards(target @ turn, target).numpy() == pytest.approx(target.numpy(), abs=1e-9)


def test_turning_keeps_distances():
    points, target = normal(1, 15, 2), normal(2, 15, 2)
    assert torch.allclose(
        torch.cdist(turned_towards(points, target), points * 0), torch.cdist(points, points * 0)
    )


def test_features_of_one_dimension_lie_on_a_line():
    points, share = principal_plane(normal(0, 10, 1))
    assert share == pytest.approx(1) and (points[:, 1] == 0).all()


def test_every_group_has_its_sample():
    groups = np.array(["a"] * 50 + ["b"] * 3, dtype=object)
    chosen = sample_by_group(groups, 10, np.random.default_rng(0))
    assert (groups[chosen] == "a").sum() == 10 and (groups[chosen] == "b").sum() == 3
    assert len(set(chosen)) == 13 and chosen.tolist() == sorted(chosen)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InvalidAudit, match="3 rows"):
        principal_plane(normal(0, 2, 4))
    with pytest.raises(InvalidAudit, match="finite"):
        principal_plane(torch.full((5, 2), float("nan")))
    with pytest.raises(InvalidAudit, match="nothing to draw"):
        principal_plane(torch.full((5, 2), 0.1))
