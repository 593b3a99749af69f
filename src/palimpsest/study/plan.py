"""The plan of a study: which models are trained, which cells are run, under which content hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from palimpsest.core.auditing import AUDITS
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.data import DATASETS
from palimpsest.models import MODELS
from palimpsest.study.fingerprint import code_fingerprint, foreign_modules
from palimpsest.study.recipe import CONTROL_SEED, POINTS, Method, Named, Recipe, Seeds, content_hash

SCHEMA = 1
"""Raised whenever results of an older version cannot be reused."""
ORIGINAL, RETRAIN = "original", "retrain"


@dataclass(frozen=True)
class Job:
    """One unit of work: plain data, so that any executor can ship it.

    Attributes:
        kind: "original" and "control" train a model, "cell" runs and audits a method.
        key: Content hash; under it the result is stored and never computed twice.
        recipe: The study's recipe as plain data.
        place: Folder or fsspec URL of the weights.
        modules: To import first, for what they register.
        request: Index of the request.
        seeds: Of the three points where chance enters.
        method: Index into the plan's methods; -1 for the untouched original.
        needs: Keys of the weights that it reads: of the original, then of the controls.
        hashes: SHA-256 of these weights, known once they are written.
        retraining_seconds: Mean time of retraining, likewise.
        start: Key of the weights that the method starts from; empty for the original.
        start_hash: SHA-256 of these weights, likewise.
        review: Whether the model at `start` is only audited again, for a request that it met earlier.
        step: Cells of one step do not wait for each other, only for those of earlier steps.
        affinity: Jobs of one affinity share passes and should run in one process.
        title: For progress bars.
    """

    kind: Literal["original", "control", "cell"]
    key: str
    recipe: dict[str, Any]
    place: str
    modules: tuple[str, ...]
    request: int
    seeds: dict[str, int]
    method: int = -1
    needs: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    retraining_seconds: float | None = None
    start: str = ""
    start_hash: str = ""
    review: bool = False
    step: int = 0
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
        requests: In words; those of a review follow the others.
    """

    originals: tuple[Job, ...]
    controls: tuple[Job, ...]
    cells: tuple[Job, ...]
    methods: tuple[Method, ...]
    requests: tuple[str, ...]

    @property
    def key(self) -> str:
        """Content hash of the study."""
        return content_hash([job.key for job in self.cells])

    def method_name(self, job: Job) -> str:
        """Registered name of a cell's method, or "original"."""
        return self.methods[job.method].name if job.method >= 0 else ORIGINAL


def methods_of(recipe: Recipe) -> tuple[Method, ...]:
    """The methods to run: retraining first if the recipe does not list it, then the recipe's."""
    listed = tuple(recipe.methods)
    if any(method.name == RETRAIN and not method.settings for method in listed):
        return listed
    return (Method(name=RETRAIN), *listed)


def audits_of(recipe: Recipe) -> list[Named]:
    """The recipe's audits, or all that run by default."""
    if recipe.audits is not None:
        return recipe.audits
    return [Named(name=name) for name, cls in AUDITS.items() if cls.card.default]


def make_plan(recipe: Recipe, splits: Sequence[ForgetSplit], data: str, place: str) -> Plan:
    """The jobs of a recipe.

    Args:
        recipe: The study.
        splits: Its requests, in order.
        data: Fingerprint of the records that they divide.
        place: Where weights are kept.

    Raises:
        UnknownName: For a method, audit, data set or model that does not exist.
    """
    return _Planner(recipe, splits, data, place).plan()


class _Planner:
    """What the hashes of all jobs share."""

    def __init__(self, recipe: Recipe, splits: Sequence[ForgetSplit], data: str, place: str):
        self.recipe, self.splits, self.place = recipe, splits, place
        self.methods = methods_of(recipe)
        self.audits = audits_of(recipe)
        # Spelled out, so that every process runs the same audits, whatever it finds to be the default.
        self.plain = recipe.model_copy(update={"audits": self.audits}).plain()
        codes = {method.name: UNLEARNERS.get(method.name) for method in self.methods}
        judges = {item.name: AUDITS.get(item.name) for item in self.audits}
        source = DATASETS.get(recipe.data.name.partition(":")[0])
        model = None if ":" in recipe.model.name else MODELS.get(recipe.model.name)
        self.modules = (*recipe.imports, *foreign_modules([*codes.values(), *judges.values(), source, model]))
        self.code = {name: code_fingerprint(code) for name, code in codes.items()}
        self.base = [
            SCHEMA,
            recipe.model_dump(mode="json", include={"model", "task", "training", "threads"}),
            Runtime(device=recipe.device).torch_device.type,
            data,
            splits[0].train.ids if recipe.task.settings else [],  # what the task may be fitted to
            code_fingerprint(UNLEARNERS.get(RETRAIN)),
            code_fingerprint(model) if model is not None else "",
        ]
        self.asked = [
            [item.model_dump(mode="json"), code_fingerprint(judges[item.name])] for item in self.audits
        ]

    def plan(self) -> Plan:
        """All jobs."""
        originals: dict[str, Job] = {}
        controls: dict[str, Job] = {}
        cells: list[Job] = []
        left: dict[tuple[int, str], str] = {}
        for request in range(len(self.splits)):
            own = [self._control(request, CONTROL_SEED + number) for number in range(self.recipe.controls)]
            controls |= {job.key: job for job in own}
            for seeds in self.recipe.seeds:
                job = self._original(request, seeds)
                originals.setdefault(job.key, job)
            for method in range(-1, len(self.methods)):
                for seeds in self.recipe.seeds:
                    chain = (method, seeds.model_dump_json())
                    cells.append(self._cell(request, method, seeds, own, left.get(chain, "")))
                    if self.recipe.in_turn and method >= 0 and not cells[-1].review:
                        left[chain] = cells[-1].key
        words = tuple(split.description for split in self.splits)
        return Plan(tuple(originals.values()), tuple(controls.values()), tuple(cells), self.methods, words)

    def _original(self, request: int, seeds: Seeds) -> Job:
        request = 0 if self.recipe.in_turn else request
        key = content_hash("original", self.base, self.splits[request].train.ids, seeds.training)
        return self._job("original", key, request, dict.fromkeys(POINTS, seeds.training), title="original")

    def _control(self, request: int, seed: int) -> Job:
        retain = self.splits[request].retain
        key = content_hash("control", self.base, retain.ids if retain else [], seed)
        return self._job("control", key, request, dict.fromkeys(POINTS, seed), title="control")

    def _cell(self, request: int, number: int, seeds: Seeds, controls: Sequence[Job], start: str) -> Job:
        method = self.methods[number] if number >= 0 else Method(name=ORIGINAL)
        parts = {name: part.ids for name, part in self.splits[request].parts.items()}
        needs = (self._original(request, seeds).key, *(job.key for job in controls))
        what = [method.name, method.settings, self.code.get(method.name, ""), seeds.model_dump()]
        turns = len(self.recipe.forget)
        review = request >= turns
        follows = [start, review] if self.recipe.in_turn else []
        return self._job(
            "cell", content_hash("cell", what, parts, needs, self.asked, *follows), request, seeds.model_dump(),
            method=number, needs=needs, start=start, review=review,
            step=min(request, turns) if self.recipe.in_turn else 0,
            affinity=f"{request}/{seeds.training}/{seeds.auditing}", title=method.title,
        )  # fmt: skip

    def _job(
        self,
        kind: Literal["original", "control", "cell"],
        key: str,
        request: int,
        seeds: dict[str, int],
        **more: Any,
    ) -> Job:
        return Job(kind, key, self.plain, self.place, self.modules, request, seeds, **more)
