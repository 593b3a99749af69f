"""Where the cells of a study of continual learning are run: one method on one stream with one seed.

After every experience the whole run is written to a file; whoever takes up the cell again goes on from
there, and ends with the same accuracy matrix bit for bit.
"""

from __future__ import annotations

import importlib
import logging
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from palimpsest.core.errors import (
    CannotWrite,
    InvalidRecipe,
    PalimpsestError,
    UnreadableCheckpoint,
)
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.data import DATASETS, parse_data
from palimpsest.models import MODELS, build_model
from palimpsest.parts.checkpoint import save_model
from palimpsest.retain.learner import LEARNERS, build_learner
from palimpsest.retain.pretraining import Pretrained, pretrain, set_apart, with_encoder
from palimpsest.retain.running import Run
from palimpsest.retain.short_form import parse_stream
from palimpsest.retain.state import load_state, save_state
from palimpsest.retain.streams import Stream
from palimpsest.study.control import place_of
from palimpsest.study.fingerprint import code_fingerprint, data_fingerprint, foreign_modules
from palimpsest.study.measuring import measuring
from palimpsest.study.plan import Job
from palimpsest.study.recipe import POINTS, content_hash
from palimpsest.study.retain.recipe import RetainRecipe, load_retain_recipe, pretraining_of, training_of
from palimpsest.study.tables import now
from palimpsest.study.workshop import Done

SCHEMA = 1
"""Raised whenever results of an older version cannot be reused."""
log = logging.getLogger("palimpsest")


class RetainWorker:
    """Does cells one after the other; every error becomes a reason, so that a study goes on."""

    def __init__(self) -> None:
        self._key = ""
        self._workshop: RetainWorkshop | None = None

    def __call__(self, job: Job) -> Done:
        """Do a cell."""
        started = now()
        try:
            return self._at(job).do(job)
        except CannotWrite as problem:
            return Done(job.key, "unwritable", str(problem), started=started)
        except PalimpsestError as problem:
            return Done(job.key, "failed", f"{type(problem).__name__}: {problem}", started=started)
        except Exception as problem:
            return Done(
                job.key, "crashed", f"{type(problem).__name__}: {problem}", traceback.format_exc(), started
            )

    def _at(self, job: Job) -> RetainWorkshop:
        key = content_hash(job.recipe, job.modules)
        if self._workshop is None or self._key != key:
            for module in job.modules:
                importlib.import_module(module)
            self._key, self._workshop = key, RetainWorkshop(load_retain_recipe(job.recipe))
        return self._workshop


class RetainWorkshop:
    """The recipe's data and streams, made when they are first asked for."""

    def __init__(self, recipe: RetainRecipe):
        for module in recipe.imports:
            try:
                importlib.import_module(module)
            except ImportError as problem:
                raise InvalidRecipe(f"The recipe imports '{module}': {problem}.") from problem
        self.recipe = recipe
        self._stream: tuple[tuple[int, int | None], Stream] | None = None
        self._encoder: tuple[int, Pretrained] | None = None

    @cached_property
    def records(self) -> Records:
        """The data set."""
        return parse_data(self.recipe.data.name, **self.recipe.data.settings)

    @cached_property
    def test(self) -> float | Records:
        """What is tested on."""
        source = self.recipe.test_data
        return self.recipe.test if source is None else parse_data(source.name, **source.settings)

    def stream(self, number: int, seed: int) -> Stream:
        """A stream of the recipe as a seed meets it; the last one is kept."""
        order = seed if self.recipe.order == "seed" else None
        if self._stream is None or self._stream[0] != (number, order):
            _, records = self.apart(seed)
            made = parse_stream(self.recipe.streams[number], records, seed=order, test=self.test)
            self._stream = ((number, order), made)
        return self._stream[1]

    def apart(self, seed: int) -> tuple[tuple[int, ...], Records]:
        """Classes that the network is pretrained on, and the records for the streams."""
        pretraining = self.recipe.pretraining
        if pretraining is None:
            return (), self.records
        drawn = Runtime(seed=seed).numpy("pretraining") if self.recipe.order == "seed" else None
        return set_apart(self.records, pretraining.classes, drawn)

    def network(self, classes: int, seed: int) -> nn.Module:
        """The architecture with fresh weights and so many outputs."""
        shape = tuple(self.records[0]["input"].shape)
        model = self.recipe.model
        return build_model(model.name, shape, classes, seed=seed, **model.settings)

    def encoder(self, seed: int, place: str | None = None) -> Pretrained:
        """The network of a seed after its pretraining, trained once and kept at `place`; the last one in memory."""
        pretraining = self.recipe.pretraining
        assert pretraining is not None
        if self._encoder is None or self._encoder[0] != seed:
            file = (
                None if place is None else Path(place, f"{content_hash('encoder', self._base, seed)}.encoder")
            )
            if file is not None and file.is_file():
                state = load_state(file)
                found = Pretrained(state["weights"], state["accuracy"])
            else:
                classes, _ = self.apart(seed)
                records = self.records.select(np.isin(self.records.column("label"), classes))
                runtime = Runtime(seed=seed, device=self.recipe.device, threads=self.recipe.threads)
                with runtime.limited():
                    found = pretrain(
                        self.network(len(classes), seed),
                        records,
                        pretraining_of(pretraining),
                        runtime,
                        self.test,
                    )
                if file is not None:
                    save_state({"weights": found.weights, "accuracy": found.accuracy}, file)
            self._encoder = (seed, found)
        return self._encoder[1]

    @property
    def _model(self) -> Callable[..., nn.Module] | None:
        """The factory of the network, if it is registered."""
        name = self.recipe.model.name
        return None if ":" in name else MODELS.get(name)

    @cached_property
    def _base(self) -> list[Any]:
        """What all cells have in common."""
        recipe, model = self.recipe, self._model
        fields = {"model", "threads", "every", "subset", "order"}
        if recipe.pretraining is not None:
            fields.add("pretraining")
        if recipe.gradients:
            fields.add("gradients")
        return [
            SCHEMA,
            recipe.model_dump(mode="json", include=fields),
            Runtime(device=recipe.device).torch_device.type,
            data_fingerprint(self.records),
            data_fingerprint(self.test) if isinstance(self.test, Records) else self.test,
            code_fingerprint(model) if model is not None else "",
        ]

    def jobs(self, place: str) -> list[Job]:
        """All cells, by stream, method and seed, with networks and states kept at `place`.

        Raises:
            UnknownName: For a learner, data set or model that does not exist.
            InvalidRecipe: If the device is not there.
        """
        recipe = self.recipe
        device = Runtime(device=recipe.device).torch_device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as problem:
            raise InvalidRecipe(f"The device '{recipe.device}' cannot be used: {problem}") from problem
        codes = {method.name: LEARNERS.get(method.name) for method in recipe.methods}
        source = DATASETS.get(recipe.data.name.partition(":")[0])
        modules = (*recipe.imports, *foreign_modules([*codes.values(), source, self._model]))
        base = self._base
        jobs: list[Job] = []
        for number, form in enumerate(recipe.streams):
            for index, method in enumerate(recipe.methods):
                training = {**recipe.training.model_dump(mode="json"), **method.training}
                what = [form, method.name, method.settings, training, code_fingerprint(codes[method.name])]
                for seed in recipe.seeds:
                    jobs.append(
                        Job(
                            "cell", content_hash("retain", base, what, seed), recipe.plain(), place, modules,
                            request=number, seeds=dict.fromkeys(POINTS, seed), method=index,
                            affinity=str(number), title=method.title,
                        )
                    )  # fmt: skip
        return jobs

    def check(self) -> None:
        """Find all bad input before any work.

        Raises:
            PalimpsestError: The first problem, in words.
        """
        for number in range(len(self.recipe.streams)):
            for seed in self.recipe.seeds if self.recipe.order == "seed" else self.recipe.seeds[:1]:
                stream = self.stream(number, seed)
                for index in range(len(self.recipe.methods)):
                    self.run(number, index, seed, stream, pretrained=False)

    def run(
        self,
        number: int,
        index: int,
        seed: int,
        stream: Stream | None = None,
        place: str | None = None,
        pretrained: bool = True,
    ) -> Run:
        """A method about to learn a stream; without `pretrained` a fresh network stands for a pretrained one."""
        recipe, method = self.recipe, self.recipe.methods[index]
        stream = stream or self.stream(number, seed)
        network = self.network(stream.classes, seed)
        if pretrained and recipe.pretraining is not None and recipe.pretraining.epochs:
            network = with_encoder(network, self.encoder(seed, place).weights)
        return Run(
            build_learner(method.name, dict(method.settings), stream.scenario),
            stream,
            network,
            training=training_of(recipe.training, method),
            runtime=Runtime(seed=seed, device=recipe.device, threads=recipe.threads),
            every=recipe.every,
            subset=recipe.subset,
            gradients=recipe.gradients,
        )

    def do(self, job: Job) -> Done:
        """Run a cell to its end, from where it was left."""
        started, seed = now(), job.seeds["training"]
        run = self.run(job.request, job.method, seed, place=job.place)
        with run.runtime.limited(), measuring(run.runtime.torch_device) as measured:
            state = state_of(job)
            if state.is_file():
                run = self._resumed(run, job)
            while not run.finished:
                run.advance()
                if not run.finished:
                    save_state(run.state_dict(), state)
        outcome = run.outcome()
        sha256 = ""
        if self.recipe.keep_models:
            sha256 = save_model(run.learner.student.model, place_of(job.place, job.key))
        report: dict[str, Any] = outcome.to_dict()
        report["order"] = list(run.stream.order)
        report["records"] = [len(experience.records) for experience in run.stream]
        report["tasks"] = [list(experience.classes) for experience in run.stream]
        if self.recipe.pretraining is not None:
            trained = self.recipe.pretraining.epochs > 0
            report["pretraining"] = {
                "classes": list(self.apart(seed)[0]),
                "accuracy": self.encoder(seed, job.place).accuracy if trained else None,
            }
        return Done(
            job.key, "done", "", "", started, sum(outcome.seconds), measured.peak_bytes, sha256, report
        )

    def _resumed(self, run: Run, job: Job) -> Run:
        """The run as its last experience left it; a file that cannot be read is left aside."""
        try:
            run.load_state_dict(load_state(state_of(job)))
        except UnreadableCheckpoint as problem:
            log.warning("%s starts again: %s", job.title, problem)
            return self.run(job.request, job.method, job.seeds["training"], place=job.place)
        return run


def state_of(job: Job) -> Path:
    """File with the state of a cell that is under way."""
    return Path(job.place, f"{job.key}.state")
