"""A learnt world, models that forgot, hide or broke, and evidence that shares what is measured on original and control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.runtime import Runtime
from tests.audit import planted_replies
from tests.language_world import TrainedWorld, trained_world

Judge = Callable[[Any, nn.Module], dict[str, Finding]]


@pytest.fixture(scope="session")
def learnt() -> TrainedWorld:
    """The tiny world with two retrained models: one is the control, the other is judged as a method that is perfect."""
    return trained_world("tiny", controls=2)


@pytest.fixture(scope="session")
def tiny(learnt: TrainedWorld) -> TrainedWorld:
    """The same, by its size."""
    return learnt


@pytest.fixture(scope="session")
def evidence(learnt: TrainedWorld) -> Evidence:
    """The original is judged, one control; the second retraining can be judged as well."""
    runtime = Runtime(seed=0, device="cpu", threads=1)
    return Evidence(learnt.original, learnt.split, learnt.task, runtime, learnt.original, learnt.controls[:1])


@pytest.fixture(scope="session")
def language_evidence(evidence: Evidence) -> Evidence:
    """The same evidence."""
    return evidence


@pytest.fixture(scope="session")
def twin(learnt: TrainedWorld) -> nn.Module:
    """Retrained with another seed than the control."""
    return learnt.controls[1]


@pytest.fixture(scope="session")
def refusing(learnt: TrainedWorld) -> nn.Module:
    names = [str(name) for name in learnt.split.forget.column("subject")]
    return planted_replies.Refusing(learnt.original, learnt.task, names)


@pytest.fixture(scope="session")
def filtering(learnt: TrainedWorld) -> nn.Module:
    values = [item["answer"] for item in learnt.split.forget if item.get("answer")]
    return planted_replies.Filtering(learnt.original, learnt.task, values)


@pytest.fixture(scope="session")
def broken(learnt: TrainedWorld) -> nn.Module:
    return planted_replies.wrecked(learnt.original, learnt.split.forget, learnt.task)


@pytest.fixture(scope="session")
def tuned(learnt: TrainedWorld) -> nn.Module:
    """Taught to refuse the plain questions."""
    return planted_replies.refusal_tuned(learnt)


@pytest.fixture
def outcome(evidence: Evidence) -> Callable[[Any, nn.Module], Outcome]:
    """Run an audit on a model; what is measured on original and control is kept for the whole session."""

    def run(audit: Any, model: nn.Module) -> Outcome:
        judged = evidence.judging(model)
        result = audit.run(judged)
        evidence._memory.update({key: value for key, value in judged._memory.items() if key[0] != UNLEARNED})
        evidence._observed.update(
            {key: value for key, value in judged._observed.items() if key[0] != UNLEARNED}
        )
        return result

    return run


@pytest.fixture
def run_on(outcome: Callable[[Any, nn.Module], Outcome]) -> Callable[[Any, nn.Module], Outcome]:
    """The same."""
    return outcome


@pytest.fixture
def judge(outcome: Callable[[Any, nn.Module], Outcome]) -> Judge:
    """The findings of an audit on a model, by name."""

    def run(audit: Any, model: nn.Module) -> dict[str, Finding]:
        return {finding.name: finding for finding in outcome(audit, model).findings}

    return run


def found(outcome: Outcome, name: str) -> Finding:
    """The finding called `name` of an outcome."""
    named = {finding.name: finding for finding in outcome.findings}
    assert name in named, f"no finding {name}: {list(named)}"
    return named[name]
