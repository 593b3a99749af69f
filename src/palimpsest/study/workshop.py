"""The workshop: does the jobs of one recipe, in whatever process it stands.

What its jobs share (records, splits, models, passes) is kept between them; results never depend on what
happens to be kept.
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

import palimpsest.audit as audit_verb
from palimpsest.core.auditing import Audit, build_audit
from palimpsest.core.errors import (
    CannotWrite,
    InvalidRecipe,
    ModelMismatch,
    PalimpsestError,
    UnreadableCheckpoint,
)
from palimpsest.core.evidence import Evidence
from palimpsest.core.needs import require
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit, at_the_end, in_turn, split
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Unlearner
from palimpsest.data import parse_data
from palimpsest.forget import build_unlearner, forget, needs_met
from palimpsest.parts.checkpoint import load_model, save_model
from palimpsest.parts.training import RECIPE_ATTRIBUTE
from palimpsest.study.control import architecture, load, place_of, train_control, train_original
from palimpsest.study.fingerprint import data_fingerprint
from palimpsest.study.measuring import Measured, measuring
from palimpsest.study.plan import ORIGINAL, Job, Plan, audits_of, make_plan, methods_of
from palimpsest.study.recipe import Recipe, content_hash, load_recipe
from palimpsest.study.tables import now
from palimpsest.tasks import build_task


@dataclass(frozen=True)
class Done:
    """What came of a job: plain data.

    Attributes:
        key: Of the job.
        status: "done"; "failed" (for a reason that will come again); "crashed" (worth another try);
            "unwritable" (no place for results: the study must stop).
        reason: Why it failed.
        detail: Traceback of an unexpected error.
        started: When it was begun, in UTC.
        seconds: Of training or unlearning.
        peak_bytes: Peak memory meanwhile.
        sha256: Of the weights that were written, if any were.
        report: The audit report as plain data, for cells.
    """

    key: str
    status: Literal["done", "failed", "crashed", "unwritable"]
    reason: str = ""
    detail: str = ""
    started: datetime = field(default_factory=now)
    seconds: float | None = None
    peak_bytes: int | None = None
    sha256: str = ""
    report: dict[str, Any] = field(default_factory=dict[str, Any])


class Worker:
    """Does jobs one after the other; every error becomes a reason, so that a study goes on."""

    def __init__(self) -> None:
        self._key, self._workshop = "", cast("Workshop | None", None)

    def __call__(self, job: Job) -> Done:
        """Do a job."""
        started = now()
        try:
            return self._at(job).do(job, started)
        except CannotWrite as problem:
            return Done(job.key, "unwritable", str(problem), started=started)
        except UnreadableCheckpoint as problem:
            return Done(job.key, "crashed", _reason(problem), started=started)
        except PalimpsestError as problem:
            return Done(job.key, "failed", _reason(problem), started=started)
        except Exception as problem:
            return Done(job.key, "crashed", _reason(problem), traceback.format_exc(), started)

    def _at(self, job: Job) -> Workshop:
        key = content_hash(job.recipe, job.modules)
        if self._workshop is None or self._key != key:
            for module in job.modules:
                importlib.import_module(module)
            self._key, self._workshop = key, Workshop(load_recipe(job.recipe))
        return self._workshop


class Workshop:
    """The recipe's data, requests and models, made when they are first asked for."""

    def __init__(self, recipe: Recipe):
        for module in recipe.imports:
            try:
                importlib.import_module(module)
            except ImportError as problem:
                raise InvalidRecipe(f"The recipe imports '{module}': {problem}.") from problem
        self.recipe = recipe
        self._evidence: tuple[str, Evidence] | None = None

    @cached_property
    def records(self) -> Records:
        """The data set."""
        return parse_data(self.recipe.data.name, **self.recipe.data.settings)

    @cached_property
    def task(self) -> Task:
        """The domain, fitted to the training records of the first request."""
        domain = self.recipe.task
        return build_task(domain.name, domain.settings, self.splits[0].train, self.records)

    @cached_property
    def splits(self) -> list[ForgetSplit]:
        """One split per request, in order; of requests in turn, then one per review at the end.

        Raises:
            InvalidRecipe: If two requests go by one name.
        """
        shares = self.recipe.split
        made = [
            split(self.records, request.selection(), shares.test, shares.holdout, shares.seed)
            for request in self.recipe.forget
        ]
        names = [parts.description for parts in made]
        for name in names:
            if names.count(name) > 1:
                raise InvalidRecipe(
                    f"Two requests are called '{name}': leave one out, or give them a name each."
                )
        if not self.recipe.in_turn:
            return made
        turns = in_turn(made)
        return [*turns, *at_the_end(turns)]

    def plan(self, place: str) -> Plan:
        """All jobs, with weights kept at `place`.

        Raises:
            InvalidRecipe: If the device is not there.
        """
        try:
            torch.empty(0, device=self.runtime(0).torch_device)
        except (RuntimeError, AssertionError) as problem:
            raise InvalidRecipe(f"The device '{self.recipe.device}' cannot be used: {problem}") from problem
        return make_plan(self.recipe, self.splits, data_fingerprint(self.records), place)

    def check(self) -> None:
        """Find all bad input before any work.

        Raises:
            PalimpsestError: The first problem, in words.
        """
        runtime = self.runtime(0)
        network = runtime.place(self.network(0))
        setattr(network, RECIPE_ATTRIBUTE, self.recipe.training.recipe())
        self._audits()
        for parts in self.splits:
            for records in parts.parts.values():
                self.task.check(network, records)
            for method in methods_of(self.recipe):
                unlearner = build_unlearner(method.name, dict(method.settings))
                if not {"any", self.task.name} & set(unlearner.card.tasks):
                    raise ModelMismatch(f"Method '{method.name}' does not work for {self.task.name}.")
                require(method.title, unlearner.card.needs, needs_met(network, parts, unlearner, self.task))

    def original(self, job: Job) -> nn.Module:
        """The trained model that a cell starts from.

        Raises:
            UnreadableCheckpoint: If its weights are gone.
        """
        return load_model(place_of(job.place, job.needs[0]), self.network(0))

    def do(self, job: Job, started: datetime) -> Done:
        """Train a model, or run and audit a cell."""
        with self.runtime(0).limited():
            return self._cell(job, started) if job.kind == "cell" else self._training(job, started)

    def _training(self, job: Job, started: datetime) -> Done:
        seed = job.seeds["training"]
        runtime, recipe = self.runtime(seed), self.recipe.training.recipe()
        parts = self.splits[job.request]
        make = train_original if job.kind == "original" else train_control
        with measuring(runtime.torch_device) as measured:
            model = make(self.network(seed), parts, self.task, runtime, recipe)
        sha256 = save_model(model, place_of(job.place, job.key))
        return Done(job.key, "done", "", "", started, measured.seconds, measured.peak_bytes, sha256)

    def _cell(self, job: Job, started: datetime) -> Done:
        shared = self._shared(job)
        start = cast(nn.Module, shared.original)
        if job.start:
            start = load(job.place, job.start, job.start_hash, self.network(0))
        unlearned, measured = self._unlearned(job, start)
        seconds = {**shared.seconds, "unlearned": measured.seconds}
        evidence = shared.judging(
            unlearned, seconds=seconds, peak_bytes=measured.peak_bytes, method=self._method(job)
        )
        report = audit_verb.examine(evidence, self._audits(), self._facts(job, measured))
        self._keep(evidence)
        sha256 = ""
        if self.recipe.keep_models and job.method >= 0 and not job.review:
            sha256 = save_model(unlearned, place_of(job.place, job.key))
        plain = cast(dict[str, Any], finite(report.to_dict()))
        return Done(job.key, "done", "", "", started, measured.seconds, measured.peak_bytes, sha256, plain)

    def _unlearned(self, job: Job, start: nn.Module) -> tuple[nn.Module, Measured]:
        """The cell's model, and what making it took: only the method is measured."""
        if job.method < 0 or job.review:
            return start, Measured()
        unlearner = cast(Unlearner, self._method(job))
        runtime = self.runtime(job.seeds["unlearning"])
        with measuring(runtime.torch_device) as measured:
            unlearned = forget(start, self.splits[job.request], unlearner, self.task, runtime=runtime)
        return unlearned, measured

    def _method(self, job: Job) -> Unlearner | None:
        """The cell's method; None for the untouched original."""
        if job.method < 0:
            return None
        method = methods_of(self.recipe)[job.method]
        return build_unlearner(method.name, dict(method.settings))

    def _facts(self, job: Job, measured: Measured) -> dict[str, Any]:
        method = methods_of(self.recipe)[job.method] if job.method >= 0 else None
        retraining = job.retraining_seconds
        return {
            "study": self.recipe.name,
            "method": method.name if method else ORIGINAL,
            "label": job.title,
            "settings": dict(method.settings) if method else {},
            "request": self.splits[job.request].description,
            "seed": job.seeds["training"],
            "seeds": dict(job.seeds),
            "step": job.step,
            "review": job.review,
            "seconds": measured.seconds,
            "peak_bytes": measured.peak_bytes,
            "retraining_seconds": retraining,
            "share_of_retraining": measured.seconds / retraining if retraining else None,
            "data": self.recipe.data.name,
            "model": self.recipe.model.name,
        }

    def _shared(self, job: Job) -> Evidence:
        """Evidence with the original and the controls of a cell; the last one is kept."""
        key = content_hash(job.affinity, job.needs, job.hashes)
        if self._evidence is None or self._evidence[0] != key:
            network = self.network(0)
            original, *controls = (
                load(job.place, needed, sha256, network)
                for needed, sha256 in zip(job.needs, job.hashes, strict=True)
            )
            seconds = {"retrained": job.retraining_seconds} if job.retraining_seconds else {}
            runtime = self.runtime(job.seeds["auditing"])
            folder = None if "://" in job.place else Path(job.place)
            evidence = Evidence(
                original,
                self.splits[job.request],
                self.task,
                runtime,
                original,
                controls,
                seconds,
                folder=folder,
            )
            self._evidence = (key, evidence)
        return self._evidence[1]

    def _keep(self, evidence: Evidence) -> None:
        """Keep what the audits of a cell found out about original and controls."""
        if self._evidence is not None and evidence.original is not None:
            self._evidence = (self._evidence[0], evidence.judging(evidence.original))

    def network(self, seed: int) -> nn.Module:
        """The architecture with fresh weights."""
        first = self.records[0].get("input")
        shape = () if first is None else tuple(first.shape)  # texts have none
        return architecture(self.recipe, shape, self._classes, seed)

    @cached_property
    def _classes(self) -> int:
        """Number of outputs: of classes the largest label and one more, else what the task says."""
        outputs = getattr(self.task, "outputs", None)
        if outputs is not None:
            return int(outputs(self.records))
        if not self.records.has_column("label") or self.records.column("label").dtype.kind not in "iu":
            raise InvalidRecipe(
                f"The data '{self.recipe.data.name}' have no integer 'label' column. For targets that are numbers set "
                "task: regression."
            )
        return int(self.records.column("label").max()) + 1

    def runtime(self, seed: int) -> Runtime:
        """Where work is done, without a progress bar: the study draws one."""
        return Runtime(seed=seed, device=self.recipe.device, threads=self.recipe.threads)

    def _audits(self) -> list[Audit]:
        return [
            build_audit(item.name, self.recipe.task.name, item.settings) for item in audits_of(self.recipe)
        ]


def finite(value: Any) -> Any:
    """Plain data without NaN and infinities (as None), which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in cast(list[Any], value)]
    return finite(value.item()) if isinstance(value, torch.Tensor) or hasattr(value, "item") else value


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"
