"""Digits of which every second one lies on its side."""

from __future__ import annotations

import torch

import palimpsest as pal


def test_every_digit_is_there_once_upright_or_turned_and_turned_ones_are_other_classes():
    plain, turned = pal.load_data("digits"), pal.load_data("turned-digits")
    assert list(plain.ids) == list(turned.ids)
    old, new = plain.column("label"), turned.column("label")
    assert set(new.tolist()) == set(range(20)) and (new % 10 == old).all()
    for digit in range(10):
        sideways = new[old == digit] >= 10
        assert sideways.tolist() == [place % 2 == 1 for place in range(len(sideways))]
    images, seen = plain.tensors["input"], turned.tensors["input"]
    lying = torch.from_numpy(new >= 10)
    assert torch.equal(seen[~lying], images[~lying])
    assert torch.equal(seen[lying], images[lying].transpose(-1, -2).flip(-2))  # its top is on the left now
