"""Forgetting rate: share of a forgotten class's training records that no longer look like training records."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from palimpsest.core.errors import InvalidAudit

Array = np.ndarray


def forgetting_rate(
    original_members: Float[Array, "members classes"],
    original_nonmembers: Float[Array, "nonmembers classes"],
    unlearned_members: Float[Array, "members classes"],
    seed: int = 42,
) -> float:
    """Share of the forget records that an attack made for the original model calls non-members.

    A linear support vector machine on standardised probabilities is fitted on the original model's outputs
    for the class's training records (members) and test records (non-members), as many of either, and asked
    about the unlearned model's outputs for the same training records ("Class Machine Unlearning for Complex Data via Concepts
    Inference and Data Poisoning", arXiv 2405.15662). Never read it alone: the machine is carried over to
    outputs that it was not made for, and may call a member what the model no longer knows at all.

    Args:
        original_members: Probabilities of the original on training records of the class.
        original_nonmembers: On test records of the class.
        unlearned_members: Probabilities of the unlearned model on the training records.
        seed: Of the draw from the larger side.

    Raises:
        InvalidAudit: If one of the three is empty.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    if min(map(len, (original_members, original_nonmembers, unlearned_members))) == 0:
        raise InvalidAudit("The forgetting rate needs training and test records of the forgotten class.")
    size = min(len(original_members), len(original_nonmembers))
    random = np.random.RandomState(seed)  # the published stream
    sides = [
        side if len(side) == size else side[random.choice(len(side), size, replace=False)]
        for side in (original_members, original_nonmembers)
    ]
    machine = make_pipeline(StandardScaler(), SVC(kernel="linear", C=1.0))
    machine.fit(np.concatenate(sides), np.repeat([1, 0], size))
    return float((machine.predict(unlearned_members) == 0).mean())
