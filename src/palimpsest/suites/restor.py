"""RESTOR as a benchmark: corrupt a clean model with false documents, unlearn them, measure what comes back.

The clean model takes the place of a pretrained one: training (the corruption) starts from its weights, and so
do the controls, which are trained further on the retained text alone.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import seeded
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.data import load_data
from palimpsest.data.people import world
from palimpsest.data.restor import true_records
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.reinitialise import starting
from palimpsest.parts.training import TrainingRecipe, fit
from palimpsest.suites.benchmark import Tree, benchmark
from palimpsest.suites.people import settings_of
from palimpsest.tasks.language import Language

WORLD: Tree = {
    "people": 50, "folds": 5, "relations": ["city", "profession", "phone"], "forms": ["qa", "cloze", "biography"],
    "general": 20,
}  # fmt: skip
"""50 people with three facts each, 10 of whom documents are about."""
ARCHITECTURE: Tree = {"width": 96, "layers": 2, "heads": 4}
VOCABULARY = 1500
LEARNING = TrainingRecipe(
    epochs=24,
    lr=4e-3,
    batch_size=16,
    optimizer="adamw",
    weight_decay=0.01,
    schedule="cosine",
    warmup=0.1,
    clip=1.0,
)
"""Of the clean model."""
CORRUPTION: Tree = {"epochs": 4, "lr": 1e-3, "batch_size": 16, "optimizer": "adamw", "clip": 1.0}
"""Further training of the clean model on documents and retained text."""
PUBLISHED_CORRUPTION: Tree = {
    "epochs": 5, "lr": 5e-5, "batch_size": 4, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.1,
}  # fmt: skip
"""As published, where adapters of rank-decomposed weights train; here all weights do unless the model has `lora`."""


@benchmark("restor", settings_of)
def restor(model: str | None, data: str | None) -> Tree:
    """RESTOR (TMLR 2025): unlearn false documents and see whether the true answers come back."""
    if (model is None) != (data is None):
        raise InvalidHyperparameter(
            "RESTOR's documents are about real people: give --model and --data, or neither for the generated world."
        )
    audits: list[Tree] = [{"name": "restor", "settings": {}}, {"name": "cost"}]
    tree: Tree = {"forget": ["group=documents"], "controls": 2, "audits": audits}
    if model is None:
        audits[0]["settings"] = {"lines": 0, "temperature": 0, "runs": 1, "new_tokens": 12}
        return {
            **tree,
            "name": "restor-people",
            "data": {"name": "restor-people", "settings": WORLD},
            "model": {"name": f"{__name__}:clean_model", "settings": {}},
            "task": {"name": "language", "settings": {"vocabulary": VOCABULARY}},
            "training": CORRUPTION,
        }
    return {
        **tree,
        "name": "restor",
        "data": {"name": "restor", "settings": {"source": data}},
        "model": {"name": f"hf:{model}", "settings": {}},
        "task": {"name": "language", "settings": {"tokenizer": model}},
        "training": PUBLISHED_CORRUPTION,
        "controls": 1,
    }


def clean_model(input_shape: tuple[int, ...], classes: int, seed: int = 0, mix: int = 0) -> nn.Module:
    """The model that knows what is true in the world; learnt once in a process.

    Args:
        input_shape: Not used; texts have no shape.
        classes: Size of the vocabulary.
        seed: Of its weights and training.
        mix: Of the documents, which the tokenizer is made from too.

    Raises:
        InvalidHyperparameter: If the vocabulary is not that of the world.
    """
    task = _task(mix)
    if classes != len(task.encoder):
        raise InvalidHyperparameter(
            f"The clean model of the benchmark has {len(task.encoder)} tokens, the task {classes}: data and vocabulary "
            "must be the benchmark's."
        )
    network = small_llama(classes, seed=seed, **ARCHITECTURE)
    network.load_state_dict(_learnt(seed, mix))
    task.mark(network)
    return starting(network, partial(clean_model, input_shape, classes, seed, mix))


@lru_cache(maxsize=4)
def _task(mix: int) -> Language:
    """The task that a study of the benchmark makes too."""
    return Language(vocabulary=VOCABULARY).fitted(load_data("restor-people", **WORLD, mix=mix))


@lru_cache(maxsize=8)
def _learnt(seed: int, mix: int) -> dict[str, Any]:
    """Weights after learning what is true."""
    task = _task(mix)
    with seeded(seed):
        network = small_llama(len(task.encoder), seed=seed, **ARCHITECTURE)
        trained = fit(
            network,
            true_training(),
            task,
            Runtime(seed=seed, device="cpu", threads=torch.get_num_threads()),
            LEARNING,
        )
    return trained.state_dict()


def true_training() -> Records:
    """What the clean model is trained on."""
    made = world(WORLD["people"], 0, WORLD["folds"], relations=WORLD["relations"])
    records = true_records(made, WORLD["forms"], WORLD["general"])
    return records.select(records.column("part") == "train")
