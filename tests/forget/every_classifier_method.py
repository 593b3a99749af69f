"""All classifier methods, with settings under which each takes about one step."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import palimpsest as pal
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.parts.training import TrainingRecipe

PACKAGE = "palimpsest.forget.classifier."
METHODS = sorted(name for name, cls in UNLEARNERS.items() if cls.__module__.startswith(PACKAGE))
CLASSES_ONLY = {"unsir"}
"""Methods that are defined for requests of whole classes only."""
SMALL: dict[str, Any] = {"epochs": 1, "msteps": 1}
"""Values of fields of these names, in whatever method has them."""
OWN: dict[str, dict[str, Any]] = {
    "gradient-ascent": {"stop_accuracy": None},
    "retrain": {"recipe": TrainingRecipe(epochs=1, lr=1e-4)},
    "unsir": {"noise_count": 4, "noise_steps": 1, "copies": 1},
    "influence": {"samples": 3, "alpha": 1e-3},
    "concept-poisoning": {"poison": "none", "labels": "random"},  # patches: test_concept_poisoning.py
    "laf": {"steps": 1, "vae_epochs": 1},
    "laf-r": {"steps": 1, "vae_epochs": 1, "repair_steps": 1},
}


def one_step(name: str) -> dict[str, Any]:
    """Settings of a method that make it short."""
    known = {item.name for item in fields(UNLEARNERS.get(name)) if item.init}  # pyright: ignore[reportArgumentType]
    common = {key: value for key, value in SMALL.items() if key in known}
    return {**common, **OWN.get(name, {})}


def forget_quickly(model: Any, request: pal.ForgetSplit, name: str, seed: int = 0, **settings: Any) -> Any:
    """One method under `one_step` settings."""
    task = pal.tasks.Classification()
    return pal.forget(model, request, name, task, seed=seed, **{**one_step(name), **settings})
