"""All methods of language models, with settings under which each takes about one step, and a world to take it in."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

import torch

import palimpsest as pal
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.data import load_data
from palimpsest.forget.gradient import Training
from palimpsest.forget.language.wrapped import Wrapped
from palimpsest.models import build_model
from palimpsest.parts.training import RECIPE_ATTRIBUTE, TrainingRecipe
from palimpsest.tasks import Language

PACKAGE = "palimpsest.forget.language."
METHODS = sorted(name for name, cls in UNLEARNERS.items() if cls.__module__.startswith(PACKAGE))
ANYWHERE = sorted(
    name
    for name, cls in UNLEARNERS.items()
    if "any" in cls.card.tasks and cls.__module__.startswith("palimpsest.")
)
"""Methods that say that they work in every domain."""
BY_GRADIENT = [name for name in METHODS if issubclass(UNLEARNERS.get(name), Training)]
"""Methods that take a rule and a scope."""
SMALL: dict[str, Any] = {"epochs": 1, "max_steps": 1, "batch_size": 4, "lr": 1e-3, "warmup": 0.0}
"""Values of fields of these names, in whatever method has them."""
OWN: dict[str, dict[str, Any]] = {
    "altpo": {"alternates": "given", "count": 1},
    "eco": {"dims": 8, "strength": 3.0},
    "in-context": {"shown": 1, "context": 0, "most_topics": 1},
    "influence": {"samples": 2, "alpha": 1e-3},
    "knowledge-isolation": {"scope": {"name": "blocks", "layers": [0]}, "chance": None},
    "l1-sparse": {"epochs": 1},
    "pdu": {"slack": 1.2, "dual_warmup": 0},
    "rmu": {"layer": 1, "steering": 2.0, "relative": True, "alpha": 1.0},
    "retrain": {"recipe": TrainingRecipe(epochs=1, lr=1e-4)},
    "system-prompt": {"most_topics": 1},
    "zero-shot": {"openings": ["{name} lives in"], "new_tokens": 8, "settings": SMALL},
}
MODELS = ("llama", "gpt2")


def one_step(name: str) -> dict[str, Any]:
    """Settings of a method that make it short."""
    known = {item.name for item in fields(UNLEARNERS.get(name)) if item.init}  # pyright: ignore[reportArgumentType]
    common = {key: value for key, value in SMALL.items() if key in known}
    return {**common, **OWN.get(name.rpartition("+")[2], {})}


def forget_quickly(
    model: Any, request: pal.ForgetSplit, name: str, task: Language, seed: int = 0, **settings: Any
):
    """One method under `one_step` settings."""
    return pal.forget(model, request, name, task, seed=seed, **{**one_step(name), **settings})


@cache
def little_world() -> tuple[pal.ForgetSplit, Language]:
    """Two people to forget and two to retain, with one relation, and the task with its tokenizer."""
    records = load_data(
        "people", people=4, relations="city", general=2, folds=2, neighbours=1, holdout=1,
        forms="qa,cloze,biography",
    )  # fmt: skip
    request = pal.split(records, pal.by_column("fold", 0))
    return request, Language(vocabulary=300, verify_template=False).fitted(records)


@cache
def untrained(kind: str, seed: int = 0) -> Any:
    """A model with random weights: a Llama, or a GPT-2 (learned positions, tied embeddings, Conv1D layers)."""
    vocabulary = len(little_world()[1].encoder)
    if kind == "llama":
        model: Any = build_model("small_llama", (), vocabulary, width=16, layers=2, heads=2, seed=seed)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocabulary, n_positions=256, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
            eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(config).eval()
    setattr(model, RECIPE_ATTRIBUTE, TrainingRecipe(epochs=1, lr=1e-3))
    return model


def wraps(model: Any) -> bool:
    """Whether a model is a wrapper around another."""
    return isinstance(model, Wrapped)
