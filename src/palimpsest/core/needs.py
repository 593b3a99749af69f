"""Needs: what a method must be given, declared on it and checked before it runs."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from palimpsest.core.errors import MissingNeed, UnknownName


class Need(StrEnum):
    """One thing that a method may need."""

    MODEL = "model"
    FORGET_DATA = "forget-data"
    FORGET_LABELS = "forget-labels"
    RETAIN_DATA = "retain-data"
    RETAIN_LABELS = "retain-labels"
    REFERENCE_MODEL = "reference-model"
    TRAINING_RECIPE = "training-recipe"
    TRAINING_HOOKS = "training-hooks"
    PRETRAINED_BACKBONE = "pretrained-backbone"

    @property
    def remedy(self) -> str:
        """What to do when it is missing."""
        return _REMEDIES[self]


_REMEDIES = {
    Need.MODEL: "pass the trained model",
    Need.FORGET_DATA: "pass the records to forget as ForgetSplit.forget",
    Need.FORGET_LABELS: "add a 'label' column or field to the forget records",
    Need.RETAIN_DATA: "pass retained records (a sample may do) as ForgetSplit.retain",
    Need.RETAIN_LABELS: "add a 'label' column or field to the retained records",
    Need.REFERENCE_MODEL: "pass the reference model that the method names in its hyperparameters",
    Need.TRAINING_RECIPE: "train with palimpsest.train, which records the recipe, or pass recipe=TrainingRecipe(...)",
    Need.TRAINING_HOOKS: "train again with the method's hooks: it cannot be applied after the fact",
    Need.PRETRAINED_BACKBONE: "pass the weights that training started from",
}


def parse_needs(names: Iterable[str]) -> frozenset[Need]:
    """Needs by name.

    Raises:
        UnknownName: For a name that is no need.
    """
    known = {need.value: need for need in Need}
    result: set[Need] = set()
    for name in names:
        if name not in known:
            raise UnknownName("need", name, known)
        result.add(known[name])
    return frozenset(result)


def require(method: str, needs: Iterable[Need], have: Iterable[Need]) -> None:
    """Check that everything needed is at hand.

    Raises:
        MissingNeed: Naming each missing need and what to do about it.
    """
    missing = sorted(set(needs) - set(have))
    if missing:
        advice = "; ".join(f"{need.value}: {need.remedy}" for need in missing)
        raise MissingNeed(f"Method '{method}' cannot run, it needs {', '.join(missing)}. To do: {advice}.")
