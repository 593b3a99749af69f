"""TOFU as a benchmark: on the published files with the user's model, or on the generated world."""

from __future__ import annotations

from palimpsest.suites.benchmark import Tree, benchmark
from palimpsest.suites.people import settings_of, world_recipe

FINE_TUNING: Tree = {
    "epochs": 5, "lr": 1e-5, "batch_size": 32, "optimizer": "adamw", "weight_decay": 0.01,
    "schedule": "cosine", "warmup": 0.2,
}  # fmt: skip
"""Published training (Llama-2-7B-chat; 2e-5 for Phi-1.5), warm-up of one epoch; the published decline is linear."""
FROM_SCRATCH: Tree = {
    "epochs": 20, "lr": 2e-3, "batch_size": 32, "optimizer": "adamw", "weight_decay": 0.01,
    "schedule": "cosine", "warmup": 0.1, "clip": 1.0,
}  # fmt: skip
"""Of a small Llama on the published questions, where the user names no model."""


@benchmark("tofu", settings_of)
def tofu(model: str | None, data: str | None) -> Tree:
    """TOFU (COLM 2024) with every metric of its leaderboard: published files by --data, else the generated world."""
    return tofu_recipe("small", model, data)


@benchmark("tofu-tiny", settings_of)
def tiny_tofu(model: str | None, data: str | None) -> Tree:
    """TOFU's metrics on 20 invented people: for a first look and for tests."""
    return tofu_recipe("tiny", model, data)


def tofu_recipe(size: str, model: str | None, data: str | None) -> Tree:
    """The recipe: with data, forget10 of the files; without, fold 0 of a generated world of that size."""
    if data is None:
        tree = world_recipe(size, model, None)
        # answers of 32 tokens are what the other audits of the world ask for too
        settings = {"new_tokens": 32, "against": "answer"}
    else:
        tree = {
            "data": {"name": "tofu", "settings": {"source": data}},
            "model": {"name": "small_llama", "settings": {"width": 128, "layers": 2}},
            "task": {"name": "language", "settings": {"vocabulary": 4000}},
            "training": FROM_SCRATCH,
            "forget": ["forget10=1"],
            "controls": 1,
        }
        if model is not None:
            tree["model"] = {"name": f"hf:{model}", "settings": {}}
            tree["task"] = {"name": "language", "settings": {"tokenizer": model}}
            tree["training"] = FINE_TUNING
        settings = {}
    audits = [{"name": "tofu", "settings": settings}, {"name": "recall"}, {"name": "cost"}]
    return {**tree, "name": f"tofu-{size}" if data is None else "tofu", "audits": audits}
