from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.parts.recorder import Recorder, undisturbed


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def trained(recorder=None, model=None):
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    torch.manual_seed(1)
    for step in range(1, 13):
        inputs = torch.randn(16, 4)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        if recorder is not None:
            recorder.after_step(model, step)
    return {name: value.clone() for name, value in model.state_dict().items()}


def rough(model):
    """A measurement that does everything that a measurement should not."""
    torch.rand(5), np.random.rand(5), random.random()
    model.train()
    model(torch.randn(32, 4)).sum().backward()
    model.eval()
    return 1.0


def test_a_recorded_training_ends_in_the_same_bits():
    model = network()
    recorder = Recorder(lambda: rough(model))
    plain, recorded = trained(), trained(recorder, model)
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    assert recorder.steps == list(range(1, 13)) and recorder.values == [1.0] * 12


def test_everything_is_as_it_was_after_a_measurement():
    model = network().train()
    model[1].eval()
    model(torch.randn(8, 4)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    buffers = [buffer.clone() for buffer in model.buffers()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with undisturbed(model):
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        rough(model)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(a is b.grad for a, b in zip(gradients, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


def test_everything_is_restored_when_a_measurement_fails():
    model = network().train()
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"), undisturbed(model):
        rough(model)
        raise RuntimeError("broken")
    assert model.training and torch.equal(before, torch.get_rng_state())


def test_measurements_come_every_few_steps_and_once_per_step():
    model, count = network(), []
    recorder = Recorder(lambda: count.append(0), every=5)
    for step in range(1, 13):
        recorder.after_step(model, step)
    recorder.now(model, 12)
    recorder.now(model, 12)
    assert recorder.steps == [5, 10, 12] and len(count) == 3


def test_a_recorder_goes_on_from_its_state():
    one = Recorder(lambda: 3, every=1)
    one.now(network(), 4)
    two = Recorder(lambda: 3, every=1)
    two.load_state_dict(one.state_dict())
    two.now(network(), 4)
    two.now(network(), 5)
    assert (two.steps, two.values) == ([4, 5], [3, 3])


def test_less_than_every_step_is_refused():
    with pytest.raises(InvalidHyperparameter, match="every 1 or more"):
        Recorder(lambda: 0, every=0)
