"""The tiny world: its evidence is shared, so that original and controls are measured once."""

from __future__ import annotations

import pytest
from torch import nn

from palimpsest.core.auditing import Audit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.runtime import Runtime
from tests.language_world import TrainedWorld, trained_world


@pytest.fixture(scope="session")
def tiny() -> TrainedWorld:
    return trained_world("tiny", controls=2)


@pytest.fixture(scope="session")
def language_evidence(tiny) -> Evidence:
    """The original is judged, one control; the second retraining can be judged as well."""
    runtime = Runtime(seed=0, device="cpu", threads=1)
    return Evidence(tiny.original, tiny.split, tiny.task, runtime, tiny.original, tiny.controls[:1])


@pytest.fixture
def run_on(language_evidence):
    """Run an audit on a model; what is measured on original and control is remembered over the session."""

    def run(audit: Audit, model: nn.Module) -> Outcome:
        evidence = language_evidence.judging(model)
        outcome = audit.run(evidence)
        kept = {key: value for key, value in evidence._memory.items() if key[0] != "unlearned"}
        language_evidence._memory.update(kept)
        language_evidence._observed.update(
            {key: value for key, value in evidence._observed.items() if key[0] != "unlearned"}
        )
        return outcome

    return run


def found(outcome: Outcome, name: str) -> Finding:
    """The finding called `name` of an outcome."""
    named = {finding.name: finding for finding in outcome.findings}
    assert name in named, f"no finding {name}: {list(named)}"
    return named[name]
