"""The plan of a study: which models are trained, which cells are run, under which content hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import palimpsest
from palimpsest.core.split import ForgetSplit
from palimpsest.study.recipe import Method, Recipe, Seeds, content_hash

SCHEMA = 1
CONTROL_SEED = 10_000
"""Seed of the first control; far from the seeds of cells, so that a retrain cell is never its own control."""
ORIGINAL, RETRAIN = "original", "retrain"


@dataclass(frozen=True)
class Job:
    """One unit of work: plain data, so that any executor can ship it.

    Attributes:
        kind: "original" and "control" train a model, "cell" runs and audits a method.
        key: Content hash; under it the result is stored and never computed twice.
        recipe: The study's recipe as plain data.
        folder: Of the run.
        request: Index of the request.
        seeds: Of the three points where chance enters.
        method: Index into the plan's methods; -1 for the untouched original.
        needs: Keys of the weights that it reads: of the original, then of the controls.
        retraining_seconds: Mean time of retraining, known once the controls are trained.
        affinity: Jobs of one affinity share passes and should run in one process.
        title: For progress bars.
    """

    kind: Literal["original", "control", "cell"]
    key: str
    recipe: dict[str, Any]
    folder: str
    request: int
    seeds: dict[str, int]
    method: int = -1
    needs: tuple[str, ...] = ()
    retraining_seconds: float | None = None
    affinity: str = ""
    title: str = ""


@dataclass(frozen=True)
class Plan:
    """All jobs of a study.

    Attributes:
        originals: One per training seed and training set.
        controls: Retrained models, per request.
        cells: In the order of tables: by request, method, seed.
        methods: The recipe's, with retraining added if it is not among them.
    """

    originals: tuple[Job, ...]
    controls: tuple[Job, ...]
    cells: tuple[Job, ...]
    methods: tuple[Method, ...]

    @property
    def key(self) -> str:
        """Content hash of the study."""
        return content_hash([job.key for job in self.cells])


def methods_of(recipe: Recipe) -> tuple[Method, ...]:
    """The methods to run: retraining first, then the recipe's."""
    listed = tuple(recipe.methods)
    if any(method.name == RETRAIN and not method.settings for method in listed):
        return listed
    return (Method(name=RETRAIN), *listed)


def make_plan(recipe: Recipe, splits: Sequence[ForgetSplit], folder: str) -> Plan:
    """The jobs of a recipe, given its requests as splits."""
    # Where and how it runs changes no result; everything else does.
    common = recipe.model_dump(mode="json", include={"data", "model", "training", "threads", "device"})
    base = [SCHEMA, palimpsest.__version__, common]
    plain = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    methods = methods_of(recipe)
    originals: dict[str, Job] = {}
    controls: list[Job] = []
    cells: list[Job] = []
    for index, split in enumerate(splits):
        train, retain = split.train.ids, split.retain.ids if split.retain else []
        own: list[Job] = []
        for number in range(recipe.controls):
            seed = CONTROL_SEED + number
            key = content_hash("control", base, retain, seed)
            seeds = {"training": seed, "unlearning": seed, "auditing": seed}
            own.append(Job("control", key, plain, folder, index, seeds, title=f"control {number + 1}"))
        controls += own
        for seeds in recipe.seeds:
            start = content_hash("original", base, train, seeds.training)
            originals.setdefault(
                start, Job("original", start, plain, folder, index, seeds.model_dump(), title="original")
            )
        parts = [part.ids for part in split.parts.values()]
        setting = [recipe.model_dump(mode="json", include={"audits"}), parts, [job.key for job in own]]
        for number in range(-1, len(methods)):
            for seeds in recipe.seeds:
                cells.append(_cell(plain, folder, index, methods, number, seeds, base, train, setting, own))
    return Plan(tuple(originals.values()), tuple(controls), tuple(cells), methods)


def _cell(
    plain: dict[str, Any],
    folder: str,
    request: int,
    methods: Sequence[Method],
    number: int,
    seeds: Seeds,
    base: list[Any],
    train: list[str],
    setting: list[Any],
    controls: Sequence[Job],
) -> Job:
    method = methods[number] if number >= 0 else Method(name=ORIGINAL)
    start = content_hash("original", base, train, seeds.training)
    about = [method.name, method.settings, seeds.model_dump(), start, setting]
    return Job(
        "cell",
        content_hash("cell", about),
        plain,
        folder,
        request,
        seeds.model_dump(),
        number,
        needs=(start, *(job.key for job in controls)),
        affinity=f"{request}/{seeds.training}/{seeds.auditing}",
        title=method.title,
    )
