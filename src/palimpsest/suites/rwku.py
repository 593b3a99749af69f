"""RWKU as a benchmark: forget a person by name, on the published files or on the generated world."""

from __future__ import annotations

from pathlib import Path

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.suites.benchmark import Tree, benchmark
from palimpsest.suites.people import settings_of, world_recipe

WORLD: Tree = {"instructions": False, "new_tokens": 16, "fluency_tokens": 32}
"""Of the audit on the generated world, whose models follow no instructions."""
WORLD_OPENINGS = ("This is the life of {name}.", "A few words about {name}.", "Meet {name}.")
"""With which the world's texts about anybody begin: they hold no fact."""
SMALL: Tree = {"lr": 1e-3, "epochs": 6, "batch_size": 16, "warmup": 0.0, "schedule": "constant"}
ZERO_SHOT: Tree = {
    "method": "npo", "settings": {**SMALL, "retain": "none"}, "situation": "none", "samples": 8, "new_tokens": 64,
    "openings": list(WORLD_OPENINGS),
}  # fmt: skip
"""Of zero-shot unlearning on the generated world, whose models only continue texts."""
UNTRAINED: Tree = {
    "epochs": 1, "lr": 1e-12, "batch_size": 32, "optimizer": "sgd", "schedule": "constant",
}  # fmt: skip
"""RWKU trains nothing: the model knows famous people already. Steps of 1e-12 leave its weights as they are."""


def rwku_settings(method: str) -> Tree:
    """Settings of methods for models of a few million parameters."""
    return dict(ZERO_SHOT) if method == "zero-shot" else settings_of(method)


@benchmark("rwku", rwku_settings)
def rwku(model: str | None, data: str | None) -> Tree:
    """RWKU (NeurIPS 2024): probes of three levels, nine adversarial kinds, members, neighbours, utility."""
    return rwku_recipe("small", model, data)


@benchmark("rwku-tiny", rwku_settings)
def tiny_rwku(model: str | None, data: str | None) -> Tree:
    """RWKU on 20 invented people: for a first look and for tests."""
    return rwku_recipe("tiny", model, data)


def rwku_recipe(size: str, model: str | None, data: str | None) -> Tree:
    """The recipe: with data, the published probes and the user's model; without, a generated world of that size.

    The published benchmark has no retrained model: nobody can retrain Llama-3 without Stephen King. Scores
    stand beside those of the original there, and verdicts that need a control are inconclusive. The
    generated world has one. The first target of the files is forgotten; name others with --forget subject=...

    Raises:
        InvalidHyperparameter: If data are named without a model: the files ask what a pretrained model knows.
    """
    if data is None:
        tree = world_recipe(size, model, None)
        audits = [{"name": "rwku", "settings": WORLD}, {"name": "cost"}]
        return {**tree, "name": f"rwku-{size}", "audits": audits}
    if model is None:
        raise InvalidHyperparameter(
            f"RWKU asks what a pretrained model knows of famous people: name one beside the data '{data}'."
        )
    return {
        "name": f"rwku-{Path(data).name}",
        "data": {"name": "rwku", "settings": {"source": data}},
        "model": {"name": f"hf:{model}", "settings": {}},
        "task": {"name": "language", "settings": {"tokenizer": model}},
        "training": UNTRAINED,
        "forget": ["target=first"],
        "controls": 1,
        "audits": [{"name": "rwku"}, {"name": "cost"}],
    }
