"""Learners around another learner: what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.retain.learner import Learner, LearnerCard, build_learner


def built_base(name: str, settings: Mapping[str, Any], wrapper: LearnerCard) -> tuple[Learner, LearnerCard]:
    """The inner learner, and the card of a wrapper around it: what both keep, where both work.

    Raises:
        UnknownName: If there is no such learner or setting.
        InvalidHyperparameter: If the inner learner is a wrapper of the same kind.
    """
    if name == wrapper.name:
        raise InvalidHyperparameter(f"'{name}' cannot be the base of itself.")
    base = build_learner(name, dict(settings))
    scenarios = tuple(scenario for scenario in wrapper.scenarios if scenario in base.card.scenarios)
    return base, replace(wrapper, keeps=wrapper.keeps | base.card.keeps, scenarios=scenarios)


def check_scenario(base: Learner, scenario: str) -> None:
    """Check that the inner learner works in a setting.

    Raises:
        ModelMismatch: If not.
    """
    if scenario not in base.card.scenarios:
        raise ModelMismatch(
            f"Learner '{base.card.name}' works in {', '.join(base.card.scenarios)}-incremental streams, not in "
            f"{scenario}-incremental ones."
        )


def buffer_of(base: Learner) -> Any:
    """The buffer of a learner (its attribute `kept`), None if it has none."""
    return cast(Any, getattr(base, "kept", None))
