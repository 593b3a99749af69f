"""A world, the model that learnt it, and its twins that never saw the people of a fold; trained once per machine.

Weights are kept in a cache folder (`PALIMPSEST_TEST_CACHE`, else the user's) under a hash of everything that
they depend on. A lock lets parallel workers wait for the one that trains.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

import palimpsest as pal
from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.data import load_data, people, people_probes, people_templates
from palimpsest.data.people import World, world
from palimpsest.models import learnt_worlds, small_llama
from palimpsest.models.learnt_worlds import LEARNT_WORLDS, LearntWorld
from palimpsest.parts import byte_pairs, scored_head, templates, tokens, training
from palimpsest.parts.training import RECIPE_ATTRIBUTE
from palimpsest.tasks.language import Language

SOURCES = (
    people,
    people_probes,
    people_templates,
    learnt_worlds,
    small_llama,
    byte_pairs,
    scored_head,
    templates,
    tokens,
    training,
)
LIBRARIES = ("torch", "transformers", "tokenizers", "Faker")


@dataclass(frozen=True)
class TrainedWorld:
    """What tests need of a learnt world.

    Attributes:
        world: People and what is true of them.
        records: All records.
        split: The request to forget the people of the fold.
        task: Language, with the world's tokenizer.
        original: Trained on forget and retain.
        controls: Trained in the same way without the forget records, of different seeds.
    """

    world: World
    records: Records
    split: ForgetSplit
    task: Language
    original: nn.Module
    controls: list[nn.Module]

    @property
    def retrained(self) -> nn.Module:
        """The first control."""
        return self.controls[0]


def trained_world(size: str = "tiny", fold: int = 0, seed: int = 0, controls: int = 1) -> TrainedWorld:
    """A learnt world; original and controls are trained by the first who asks for them.

    Args:
        size: "tiny" (20 people, 3 relations) or "small" (40 people, 6 relations).
        fold: Of the people to forget.
        seed: Of weights and order in training the original; control number i has seed + 1 + i.
        controls: Number of retrained models.
    """
    recipe = LEARNT_WORLDS[size]
    records = load_data("people", **recipe.data)
    split = pal.split(records, pal.by_column("fold", fold))
    task = Language(tokenizer=recipe.tokenizer(records))
    original = _trained(recipe, task, split.train, seed, f"{size}-{seed}")
    twins = [
        _trained(recipe, task, split.retain, seed + 1 + number, f"{size}-without-{fold}-{seed + 1 + number}")
        for number in range(controls)
    ]
    whole = {key: value for key, value in recipe.data.items() if key not in ("forms", "general", "countries")}
    return TrainedWorld(world(**whole), records, split, task, original, twins)


def _trained(recipe: LearntWorld, task: Language, records: Records, seed: int, name: str) -> nn.Module:
    """A model from the cache, or trained and put there."""
    model = recipe.model(len(task.encoder), seed)
    file = _folder() / f"{name}-{_key(recipe)}.safetensors"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            trained = pal.train(model, records, task=task, recipe=recipe.training, seed=seed)
            unfinished = file.with_suffix(".part")
            save_file(trained.state_dict(), unfinished)
            unfinished.replace(file)
    model.load_state_dict(load_file(file))
    setattr(model, RECIPE_ATTRIBUTE, recipe.training)
    task.mark(model)
    return model.eval()


def _key(recipe: LearntWorld) -> str:
    """Hash of the sources, versions and settings that weights depend on."""
    parts = [inspect.getsource(module) for module in SOURCES]
    parts += [f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES]
    return hashlib.sha256("\0".join([*parts, repr(recipe)]).encode()).hexdigest()[:16]


def _folder() -> Path:
    own = os.environ.get("PALIMPSEST_TEST_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(own) if own else user / "palimpsest" / "language-worlds"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
