from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.parts import windows
from palimpsest.parts.windows import (
    Grid,
    as_planes,
    cut,
    paste,
    peaks,
    places_at_random,
    shrunk,
    similarity_maps,
)


@given(height=st.integers(1, 7), width=st.integers(1, 7), data=st.data(), seed=st.integers(0, 99))
def test_what_is_pasted_is_cut_again_and_nothing_else_moves(height, width, data, seed):
    size = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    generator = torch.Generator().manual_seed(seed)
    planes, patches = torch.zeros(3, 2, height, width), 1 + torch.rand(3, 2, *size, generator=generator)
    centers = torch.stack(
        [
            torch.randint(-2, width + 2, (3,), generator=generator),
            torch.randint(-2, height + 2, (3,), generator=generator),
        ],
        1,
    )
    result = paste(planes, patches, centers)
    assert torch.equal(cut(result, centers, size), patches)
    assert int((result != 0).sum()) == patches.numel() and not planes.any()


def test_windows_at_the_border_are_moved_inside():
    plane = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert cut(plane, torch.tensor([[0, 0]]), (2, 2)).flatten().tolist() == [0, 1, 4, 5]
    assert cut(plane, torch.tensor([[9, 3]]), (2, 3)).flatten().tolist() == [9, 10, 11, 13, 14, 15]


@pytest.mark.parametrize("size", [(5, 2), (2, 5), (0, 1)])
def test_a_patch_larger_than_the_image_is_refused(size):
    with pytest.raises(InvalidHyperparameter, match="does not fit an input of 4 x 4"):
        cut(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, dtype=torch.long), size)


def brightness(planes):
    return torch.stack([planes.flatten(1).sum(1), torch.ones(len(planes))], 1)


@pytest.mark.parametrize("view", ["alone", "enlarged"])
def test_the_peak_is_where_the_concept_was_put(view):
    planes = torch.zeros(3, 1, 9, 12)
    for plane, (x, y) in zip(planes, [(4, 1), (10, 7), (1, 4)], strict=True):
        plane[0, y - 1 : y + 2, x - 1 : x + 2] = 1
    maps = similarity_maps(planes, brightness, torch.tensor([[1.0, 0.0]]), Grid((3, 3), (1, 1)), view)
    assert maps.shape == (3, 7, 10, 1)
    centers, concepts, values = peaks(maps, Grid((3, 3), (1, 1)))
    assert centers.tolist() == [[4, 1], [10, 7], [1, 4]] and not concepts.any() and (values <= 1).all()


def test_many_planes_are_read_in_parts_with_the_same_maps(monkeypatch):
    planes = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    given = (brightness, torch.tensor([[0.6, 0.8]]), Grid((2, 2), (1, 1)), "alone")
    whole, sizes = similarity_maps(planes, *given), []
    monkeypatch.setattr(windows, "AT_ONCE", 20)
    counted = lambda seen: sizes.append(len(seen)) or brightness(seen)  # noqa: E731
    assert torch.equal(similarity_maps(planes, counted, *given[1:]), whole) and sizes == [18, 18, 9]


def test_windows_of_nothing_but_padding_are_no_candidates():
    tokens = as_planes(torch.tensor([[5, 6, 7, 0, 0, 0]]))
    directions = torch.tensor([[-1.0, 0.0]])  # the least is the best
    maps = similarity_maps(tokens, lambda p: brightness(p.float()), directions, Grid((1, 2), (1, 1)), "alone")
    assert torch.isinf(maps[0, 0, :, 0]).tolist() == [False, False, False, True, True]


def test_random_places_reach_every_corner_and_lie_inside():
    places = places_at_random(4000, (3, 5), (8, 8), torch.Generator().manual_seed(0))
    corner = places - torch.tensor([5 // 2, 3 // 2])
    assert corner.min(0).values.tolist() == [0, 0] and corner.max(0).values.tolist() == [3, 5]


def test_a_shrunk_image_keeps_its_mean_brightness():
    image = torch.full((1, 3, 8, 8), 0.7)
    assert torch.allclose(shrunk(image, (6, 6)), torch.tensor(0.7))
