"""Signals of the models in evidence, computed once per model and part."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.audit.membership.population import Features
from palimpsest.audit.membership.rates import Scores
from palimpsest.audit.membership.signals import member_signals
from palimpsest.core.evidence import Evidence


def signals_of(
    evidence: Evidence, role: str, part: str, where: NDArray[np.int64] | None = None
) -> dict[str, Scores]:
    """The signals of `member_signals` of a model on a part, or on the records of it at positions `where`."""

    def compute() -> dict[str, Scores]:
        labels = torch.from_numpy(evidence.labels(part).astype(np.int64))
        found = member_signals(evidence.observe(role, part).logits, labels)
        return {name: values.numpy() for name, values in found.items()}

    whole = evidence.remember(("membership signals", role, part), compute)
    return whole if where is None else {name: values[where] for name, values in whole.items()}


def feature_matrix(signals: dict[str, Scores]) -> Features:
    """All signals side by side, as the logistic attack takes them."""
    return np.stack(list(signals.values()), axis=1)


def same_draw(evidence: Evidence, purpose: str) -> np.random.Generator:
    """A fresh generator in the same state at every call, so that all models get the same draw."""
    return evidence.runtime.numpy("membership", purpose)
