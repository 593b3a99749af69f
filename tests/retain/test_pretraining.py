from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InvalidStream, ModelMismatch
from palimpsest.parts.reinitialise import fresh_start, is_pretrained
from palimpsest.retain import Training
from palimpsest.retain.pretraining import pretrain, set_apart, with_encoder


def classes_of(records):
    return set(np.unique(records.column("label")).tolist())


@pytest.mark.parametrize(("classes", "expected"), [(2, (4, 5)), ([0, 3], (0, 3)), ((5, 1, 2), (1, 2, 5))])
def test_classes_for_pretraining_and_for_the_stream_have_none_in_common(few_digits, classes, expected):
    chosen, left = set_apart(few_digits, classes)
    assert chosen == expected
    assert classes_of(left) == set(range(6)) - set(expected)


def test_they_are_drawn_by_the_seed(few_digits):
    drawn = [set_apart(few_digits, 3, np.random.default_rng(seed))[0] for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1 and all(len(item) == 3 for item in drawn)


@pytest.mark.parametrize(
    ("classes", "words"),
    [(6, "leave none"), (9, "leave none"), (1, "at least 2"), ([1, 1], "once each"), ([1, 8], "once each")],
)
def test_impossible_classes_are_refused(few_digits, classes, words):
    with pytest.raises(InvalidStream, match=words):
        set_apart(few_digits, classes)


def test_the_encoder_is_learned_and_the_head_is_new(few_digits, small_mlp, cpu):
    chosen, _ = set_apart(few_digits, 3)
    own = few_digits.select(np.isin(few_digits.column("label"), chosen))
    start = small_mlp(3)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    found = pretrain(start, own, Training(epochs=10, lr=0.1), cpu())
    assert found.accuracy > 0.8
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    network = small_mlp(4, seed=5)
    model = with_encoder(network, found.weights)
    assert torch.equal(model.head.weight, network.head.weight)
    assert torch.equal(model.hidden[0].weight, found.weights["hidden.0.weight"])
    assert not torch.equal(model.hidden[0].weight, network.hidden[0].weight)
    assert is_pretrained(model) and not is_pretrained(network)
    assert torch.equal(fresh_start(model, cpu()).hidden[0].weight, model.hidden[0].weight)
    with pytest.raises(ModelMismatch, match="hidden"):
        with_encoder(torch.nn.Sequential(torch.nn.Linear(64, 4)), found.weights)
