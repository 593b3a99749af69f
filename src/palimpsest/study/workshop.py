"""The workshop: does one job of a plan, in whatever process it is asked to.

`work` is what executors call: plain data in, plain data out. What jobs of one process share (records,
splits, models, passes) is kept between calls; results never depend on what happens to be kept.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import nn

import palimpsest.audit as audit_verb
from palimpsest.core.auditing import AUDITS, Audit
from palimpsest.core.errors import InvalidRecipe, PalimpsestError
from palimpsest.core.evidence import Evidence
from palimpsest.core.needs import require
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit, split
from palimpsest.core.unlearner import build
from palimpsest.data import parse_data
from palimpsest.forget import build_unlearner, forget, needs_met
from palimpsest.parts.checkpoint import save_model
from palimpsest.parts.training import RECIPE_ATTRIBUTE
from palimpsest.study.control import architecture, load, place_of, train_control, train_original
from palimpsest.study.measuring import measuring
from palimpsest.study.plan import ORIGINAL, Job, methods_of
from palimpsest.study.recipe import Recipe, content_hash, load_recipe
from palimpsest.tasks import Classification


@dataclass(frozen=True)
class Done:
    """What came of a job: plain data.

    Attributes:
        key: Of the job.
        status: "done"; "failed" (for a reason that will come again); "crashed" (worth another try).
        reason: Why it failed.
        seconds: Of training or unlearning.
        peak_bytes: Peak memory meanwhile.
        sha256: Of the weights that were written, if any were.
        report: The audit report as plain data, for cells.
        detail: Traceback of an unexpected error.
    """

    key: str
    status: Literal["done", "failed", "crashed"]
    reason: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None
    sha256: str = ""
    report: dict[str, Any] = field(default_factory=dict[str, Any])
    detail: str = ""


def work(job: Job) -> Done:
    """Do a job; every error becomes a reason, so that a study goes on."""
    try:
        return _workshop(content_hash(job.recipe), job).do(job)
    except PalimpsestError as problem:
        return Done(job.key, "failed", f"{type(problem).__name__}: {problem}")
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
        return Done(job.key, "crashed", reason, detail=traceback.format_exc())


_kept: dict[str, Workshop] = {}


def _workshop(key: str, job: Job) -> Workshop:
    if key not in _kept:
        _kept.clear()
        _kept[key] = Workshop(load_recipe(job.recipe))
    return _kept[key]


class Workshop:
    """The recipe's data, requests and models, made when they are first asked for."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.task = Classification()
        self._evidence: tuple[str, Evidence] | None = None

    @cached_property
    def records(self) -> Records:
        """The data set."""
        return parse_data(self.recipe.data.name, **self.recipe.data.settings)

    @cached_property
    def splits(self) -> list[ForgetSplit]:
        """One split per request, in order."""
        shares = self.recipe.split
        return [
            split(self.records, request.selection(), shares.test, shares.holdout, shares.seed)
            for request in self.recipe.forget
        ]

    @cached_property
    def classes(self) -> int:
        """Number of logits: the largest label and one more.

        Raises:
            InvalidRecipe: If the data have no integer labels.
        """
        if not self.records.has_column("label") or self.records.column("label").dtype.kind not in "iu":
            raise InvalidRecipe(f"The data '{self.recipe.data.name}' have no integer 'label' column.")
        return int(self.records.column("label").max()) + 1

    def network(self, seed: int) -> nn.Module:
        """The architecture with fresh weights."""
        return architecture(self.recipe, tuple(self.records[0]["input"].shape), self.classes, seed)

    def runtime(self, seed: int) -> Runtime:
        """Where work is done, without a progress bar: the study draws one."""
        return Runtime(seed=seed, device=self.recipe.device, threads=self.recipe.threads)

    def audits(self) -> list[Audit] | None:
        """The audits of the recipe, or None for the default ones."""
        if self.recipe.audits is None:
            return None
        return [
            build("audit", AUDITS.get(item.name), item.name, item.settings) for item in self.recipe.audits
        ]

    def check(self) -> None:
        """Find all bad input before any work.

        Raises:
            PalimpsestError: The first problem, in words.
        """
        network = self.network(0)
        self.audits()
        runtime = self.runtime(0)
        recipe = self.recipe.training.recipe()
        for parts in self.splits:
            for records in parts.parts.values():
                self.task.check(runtime.place(network), records)
            for method in methods_of(self.recipe):
                unlearner = build_unlearner(method.name, dict(method.settings))
                setattr(network, RECIPE_ATTRIBUTE, recipe)
                require(method.title, unlearner.card.needs, needs_met(network, parts, unlearner))

    def do(self, job: Job) -> Done:
        """Train a model, or run and audit a cell."""
        with self.runtime(0).limited():
            return self._cell(job) if job.kind == "cell" else self._training(job)

    def _training(self, job: Job) -> Done:
        seed = job.seeds["training"]
        parts, runtime, recipe = self.splits[job.request], self.runtime(seed), self.recipe.training.recipe()
        make = train_original if job.kind == "original" else train_control
        with measuring(runtime.torch_device) as measured:
            model = make(self.network(seed), parts, self.task, runtime, recipe)
        sha256 = save_model(model, place_of(job.folder, job.key))
        return Done(job.key, "done", "", measured.seconds, measured.peak_bytes, sha256)

    def _cell(self, job: Job) -> Done:
        parts = self.splits[job.request]
        shared = self._shared(job)
        original = cast(nn.Module, shared.original)
        runtime = self.runtime(job.seeds["unlearning"])
        method = methods_of(self.recipe)[job.method] if job.method >= 0 else None
        name = method.name if method else ORIGINAL
        unlearned, seconds, peak = original, 0.0, None
        if method is not None:
            unlearner = build_unlearner(method.name, dict(method.settings))
            with measuring(runtime.torch_device) as measured:
                unlearned = forget(original, parts, unlearner, self.task, runtime=runtime)
            seconds, peak = measured.seconds, measured.peak_bytes
        times = {**shared.seconds, "unlearned": seconds}
        evidence = shared.judging(unlearned, seconds=times, peak_bytes=peak)
        facts = {
            "study": self.recipe.name,
            "method": name,
            "label": method.title if method else ORIGINAL,
            "settings": dict(method.settings) if method else {},
            "request": parts.description,
            "seed": job.seeds["training"],
            "seeds": dict(job.seeds),
            "seconds": seconds,
            "share_of_retraining": seconds / times["retrained"] if times.get("retrained") else None,
            "data": self.recipe.data.name,
            "model": self.recipe.model.name,
        }
        report = audit_verb.examine(evidence, self.audits(), facts)
        self._keep_shared(evidence)
        sha256 = ""
        if self.recipe.keep_models and method is not None:
            sha256 = save_model(unlearned, place_of(job.folder, job.key))
        return Done(
            job.key, "done", "", seconds, peak, sha256, cast(dict[str, Any], finite(report.to_dict()))
        )

    def _shared(self, job: Job) -> Evidence:
        """Evidence with the original and the controls of a cell; the last one is kept."""
        key = f"{job.affinity}/{job.needs}"
        if self._evidence is None or self._evidence[0] != key:
            start, *controls = job.needs
            network = self.network(0)
            original = load(job.folder, start, network)
            models = [load(job.folder, control, network) for control in controls]
            runtime = self.runtime(job.seeds["auditing"])
            seconds = {"retrained": job.retraining_seconds} if job.retraining_seconds else {}
            evidence = Evidence(
                original, self.splits[job.request], self.task, runtime, original, models, seconds
            )
            self._evidence = (key, evidence)
        return self._evidence[1]

    def _keep_shared(self, evidence: Evidence) -> None:
        """Keep what the audits of a cell found out about original and controls."""
        if self._evidence is not None and evidence.original is not None:
            self._evidence = (self._evidence[0], evidence.judging(evidence.original))


def finite(value: Any) -> Any:
    """Plain data without NaN and infinities (as None), which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in cast(list[Any], value)]
    return value.item() if isinstance(value, torch.Tensor) or hasattr(value, "item") else value
