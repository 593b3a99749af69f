"""MUSE as a benchmark: six ways to look at an unlearned model, on published files or on the generated world.

One request gives C1 to C4 (`muse`). Growing, nested requests, each put to the original, give scalability
(C5, `muse-scalability`); disjoint requests in turn give sustainability (C6, `muse-sustainability`). The report of
the latter two draws the scores as curves over the requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from palimpsest.models.learnt_worlds import LEARNT_WORLDS
from palimpsest.suites.benchmark import Tree, benchmark
from palimpsest.suites.muse_scores import check_disjoint, check_nested
from palimpsest.suites.people import settings_of, world_recipe

FOLDS = 4
"""Sets of scalability and of sustainability."""
WORLD: Tree = {"shots": 0, "verbatim_tokens": 48, "answer_tokens": 16}
"""Of the audit on the generated world, whose models have seen one question at a time and short biographies."""
FINE_TUNING: Tree = {
    "epochs": 5, "lr": 1e-5, "batch_size": 32, "optimizer": "adamw", "weight_decay": 0.01, "schedule": "constant",
}  # fmt: skip
"""Of the user's model on the published texts."""
FROM_SCRATCH: Tree = {
    "epochs": 20, "lr": 2e-3, "batch_size": 16, "optimizer": "adamw", "weight_decay": 0.01,
    "schedule": "cosine", "warmup": 0.1, "clip": 1.0,
}  # fmt: skip
"""Of a small Llama on the published texts, where the user names no model."""
Ways = Literal["request", "scalability", "sustainability"]


@benchmark("muse", settings_of)
def muse(model: str | None, data: str | None) -> Tree:
    """MUSE (ICLR 2025), C1 to C4: verbatim and knowledge memorisation, privacy leakage, utility."""
    return muse_recipe("small", model, data, "request")


@benchmark("muse-tiny", settings_of)
def tiny_muse(model: str | None, data: str | None) -> Tree:
    """MUSE on 20 invented people: for a first look and for tests."""
    return muse_recipe("tiny", model, data, "request")


@benchmark("muse-scalability", settings_of)
def muse_scalability(model: str | None, data: str | None) -> Tree:
    """MUSE, C5: what is left of utility as the forget set grows, each set forgotten from the original."""
    return muse_recipe("small", model, data, "scalability")


@benchmark("muse-sustainability", settings_of)
def muse_sustainability(model: str | None, data: str | None) -> Tree:
    """MUSE, C6: what is left of utility as requests follow each other."""
    return muse_recipe("small", model, data, "sustainability")


def muse_recipe(size: str, model: str | None, data: str | None, ways: Ways) -> Tree:
    """The recipe: with data, the published sets; without, folds of a generated world of that size.

    Args:
        size: "tiny" or "small", of the generated world.
        model: The user's model, or None for a small Llama that learns everything from scratch.
        data: Folder or Hub name of the published files.
        ways: One request, nested requests (C5), or disjoint ones in turn (C6).
    """
    if data is None:
        tree = {**world_recipe(size, model, None), "name": f"muse-{size}"}
        tree["forget"] = world_requests(ways, LEARNT_WORLDS[size].data["folds"])
        tree["audits"] = [{"name": "muse", "settings": WORLD}, {"name": "cost"}]
    else:
        tree = published_recipe(model, data)
        tree["forget"] = published_requests(ways)
    if ways != "request":
        tree["name"] = f"{tree['name']}-{ways}"
    if ways == "sustainability":
        tree["in_turn"] = True
    return tree


def world_requests(ways: Ways, folds: int) -> list[Tree]:
    """Requests for folds of people: the first, growing sets of them, or one after the other."""
    names = {f"fold {number + 1}": {number} for number in range(min(FOLDS, folds - 1))}
    if ways == "request":
        return [{"column": "fold", "values": [0]}]
    if ways == "scalability":
        sets = {
            f"{count + 1} folds" if count else "1 fold": set(range(count + 1)) for count in range(len(names))
        }
        check_nested({name: [str(fold) for fold in inside] for name, inside in sets.items()})
    else:
        sets = names
        check_disjoint({name: [str(fold) for fold in inside] for name, inside in sets.items()})
    return [{"name": name, "column": "fold", "values": sorted(inside)} for name, inside in sets.items()]


def published_requests(ways: Ways) -> list[Tree]:
    """Requests for the published forget sets; `palimpsest.data.muse` checks that they are nested or disjoint."""
    if ways == "request":
        return [{"name": "forget", "column": "role", "values": ["forget"]}]
    kind = "scal" if ways == "scalability" else "sust"
    return [
        {"name": f"forget_{number}", "column": f"{kind}_{number}", "values": [1]}
        for number in range(1, FOLDS + 1)
    ]


def published_recipe(model: str | None, data: str) -> Tree:
    """Everything but the requests, on published files."""
    tree: dict[str, Any] = {
        "name": f"muse-{Path(data).name}",
        "data": {"name": "muse", "settings": {"source": data}},
        "model": {"name": "small_llama", "settings": {"width": 128, "layers": 2, "length": 4096}},
        "task": {"name": "language", "settings": {"vocabulary": 8000}},
        "training": FROM_SCRATCH,
        "controls": 1,
        "audits": [{"name": "muse"}, {"name": "cost"}],
    }
    if model is not None:
        tree["model"] = {"name": f"hf:{model}", "settings": {}}
        tree["task"] = {"name": "language", "settings": {"tokenizer": model}}
        tree["training"] = FINE_TUNING
    return tree
