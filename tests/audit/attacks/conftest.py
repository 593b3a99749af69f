"""Evidence for class and random forgetting of the digits, shared so that controls are attacked once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.runtime import Runtime


@pytest.fixture(scope="session")
def class_evidence(class_request, digits_task, digits_model, class_controls):
    """The original is judged; `judging` takes another model. The third retraining is left out of the controls."""
    runtime = Runtime(seed=0, device="cpu")
    return Evidence(digits_model, class_request, digits_task, runtime, digits_model, class_controls[:2])


@pytest.fixture(scope="session")
def random_evidence(random_request, digits_task, digits_model, random_controls):
    runtime = Runtime(seed=0, device="cpu")
    return Evidence(digits_model, random_request, digits_task, runtime, digits_model, random_controls[:2])


@pytest.fixture
def judge(class_evidence):
    """Run an audit on a model; what is measured on original and controls is remembered over the session."""

    def run(audit, model: nn.Module) -> Outcome:
        evidence = class_evidence.judging(model)
        outcome = audit.run(evidence)
        kept = {key: value for key, value in evidence._memory.items() if key[0] != "unlearned"}
        class_evidence._memory.update(kept)
        return outcome

    return run


@pytest.fixture
def read():
    """The finding called `name` of an outcome."""

    def find(outcome: Outcome, name: str) -> Finding:
        found = {finding.name: finding for finding in outcome.findings}
        assert name in found, f"no finding {name}: {list(found)}"
        return found[name]

    return find


@pytest.fixture
def unchanged():
    """A check that models keep their weights, modes and requires_grad."""

    def fingerprint(model: nn.Module) -> tuple:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        return weights, modes, [parameter.requires_grad for parameter in model.parameters()]

    def check(model: nn.Module, before: tuple) -> None:
        weights, modes, trainable = fingerprint(model)
        assert all(torch.equal(weights[name], tensor) for name, tensor in before[0].items())
        assert (modes, trainable) == before[1:]

    return fingerprint, check
