"""The generated world as a benchmark: learnt from scratch, forgotten, and compared with its twin."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget.gradient import Training
from palimpsest.models.learnt_worlds import LEARNT_WORLDS
from palimpsest.suites.benchmark import Tree, benchmark

SMALL_MODEL = {"lr": 1e-3, "epochs": 10, "batch_size": 16, "warmup": 0.0, "schedule": "constant"}
"""Training settings of gradient methods on models of a few million parameters; published ones are for 7 billion."""
OWN: dict[str, Tree] = {
    "grad-ascent": {"lr": 3e-4, "epochs": 3},
    "knowledge-isolation": {
        "lr": 2e-3,
        "accumulate": 1,
        "cap": 2.5,
        "scope": {"name": "traced", "samples": 5, "window": 1, "facts": 12},
    },
    "retrain": {},
    "system-prompt": {"obey": "rule"},
    "uld": {
        "tuning": "full",
        "lr": 2e-3,
        "epochs": 30,
        "batch_size": 16,
        "accumulate": 1,
        "relative_top": 0.05,
        "alpha": 1.0,
    },
}
"""What single methods take instead."""


def settings_of(method: str) -> Tree:
    """Settings of a method for models of a few million parameters."""
    cls: Any = UNLEARNERS.get(method)
    known = {item.name for item in fields(cls)}
    base = method.rpartition("+")[2]
    general = SMALL_MODEL if issubclass(cls, Training) else {}
    wanted = {**general, **OWN.get(base, {}), **OWN.get(method, {})}
    return {key: value for key, value in wanted.items() if key in known}


@benchmark("people", settings_of)
def people(model: str | None, data: str | None) -> Tree:
    """40 invented people, a small Llama that learns them from scratch, 8 of them to forget."""
    return world_recipe("small", model, data)


@benchmark("people-tiny", settings_of)
def tiny_people(model: str | None, data: str | None) -> Tree:
    """20 invented people with three facts each, learnt in seconds: for a first look and for tests."""
    return world_recipe("tiny", model, data)


def world_recipe(size: str, model: str | None, data: str | None) -> Tree:
    """The recipe of a world by size; with the user's own model it is fine-tuned on the world instead.

    Raises:
        InvalidHyperparameter: If data are named: the world generates its own.
    """
    if data is not None:
        raise InvalidHyperparameter(f"The generated world takes no data ('{data}'): it makes its own.")
    learnt = LEARNT_WORLDS[size]
    tree: Tree = {
        "name": f"people-{size}",
        "data": {"name": "people", "settings": learnt.data},
        "model": {"name": "small_llama", "settings": learnt.architecture},
        "task": {"name": "language", "settings": {"vocabulary": learnt.vocabulary}},
        "training": learnt.training.to_dict(),
        "forget": ["fold=0"],
        "controls": 2,
    }
    if model is not None:
        tree["model"] = {"name": f"hf:{model}", "settings": {}}
        tree["task"] = {"name": "language", "settings": {"tokenizer": model}}
        tree["training"] = FINE_TUNING
    return tree


FINE_TUNING: Tree = {
    "epochs": 5, "lr": 1e-4, "batch_size": 16, "optimizer": "adamw", "weight_decay": 0.01,
    "schedule": "cosine", "clip": 1.0,
}  # fmt: skip
"""Of a pretrained model on the world's texts."""
