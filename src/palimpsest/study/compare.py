"""The main job: run a study's cells, resume what is there, and gather the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from palimpsest.audit.report import AuditReport
from palimpsest.core.errors import CannotWrite, InvalidRecipe, RunLocked
from palimpsest.core.writing import check_writable, write_text
from palimpsest.study.control import is_sound, place_of
from palimpsest.study.executors import Executor, LocalExecutor
from palimpsest.study.plan import ORIGINAL, Job, Plan, make_plan
from palimpsest.study.recipe import Recipe, load_recipe
from palimpsest.study.result import CellResult, StudyResult
from palimpsest.study.store import ArtifactRow, CellRow, FindingRow, SeriesRow, Store, now
from palimpsest.study.workshop import Done, Workshop


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path = "runs/study",
    overrides: Iterable[str] = (),
    workers: int | None = None,
    progress: bool = True,
    wait: bool = True,
    executor: Executor | None = None,
) -> StudyResult:
    """Compare methods with retraining on the requests of a recipe.

    Every cell (method x request x seed) is stored under the hash of all that determines it. A study that
    was interrupted, even by SIGKILL, goes on where it stood; one that was extended runs only what is new.

    Args:
        recipe: A `Recipe`, a mapping, or a YAML file.
        out: Folder of the run: recipe.yaml, study.sqlite, artifacts.
        overrides: "key=value" changes of the recipe.
        workers: Processes, instead of the recipe's.
        progress: Whether to draw a progress bar on standard error.
        wait: Whether to wait while another process works on the folder; else `RunLocked` is raised.
        executor: Where jobs run, instead of the recipe's executor.

    Raises:
        InvalidRecipe, UnknownName, InvalidSplit, MissingNeed, ...: Bad input, before any work.
        CannotWrite: If the folder or the store cannot be written.
        RunLocked: See `wait`.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif list(overrides):
        recipe = load_recipe(recipe.model_dump(mode="json", by_alias=True, exclude_none=True), overrides)
    workshop = Workshop(recipe)
    plan = make_plan(recipe, workshop.splits, str(Path(out).resolve()))
    workshop.check()
    folder = check_writable(out)
    console = Console(stderr=True, quiet=not progress)
    with ExitStack() as stack:
        stack.enter_context(_locked(folder, wait, console))
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        store = Store(recipe.store or f"sqlite:///{folder.resolve() / 'study.sqlite'}")
        stack.callback(store.close)
        plain = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        store.put_study(plan.key, recipe.name, plain, [job.key for job in plan.cells])
        run = _Run(plan, store, executor or LocalExecutor(recipe.workers if workers is None else workers))
        run.all(stack.enter_context(_bar(console)))
        return _result(recipe.name, folder, plan, workshop, store)


def open_run(folder: str | Path, store: str | None = None) -> StudyResult:
    """The result of the study that was last run in a folder, as far as it has come.

    Raises:
        InvalidRecipe: If the folder holds no study.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise InvalidRecipe(f"{folder} holds no study: there is no recipe.yaml in it.")
    recipe = load_recipe(folder / "recipe.yaml")
    workshop = Workshop(recipe)
    plan = make_plan(recipe, workshop.splits, str(folder.resolve()))
    database = Store(store or recipe.store or f"sqlite:///{folder.resolve() / 'study.sqlite'}")
    try:
        return _result(recipe.name, folder, plan, workshop, database)
    finally:
        database.close()


class _Run:
    """The three waves of a study: originals, controls, cells."""

    def __init__(self, plan: Plan, store: Store, executor: Executor):
        self.plan, self.store, self.executor = plan, store, executor
        self.failed: dict[str, str] = {}

    def all(self, bar: Progress) -> None:
        """Run every job that has no result yet."""
        folder = self.plan.cells[0].folder
        known = self.store.artifacts()
        trained = {key for key, row in known.items() if is_sound(folder, key, row.sha256)}
        waves = [
            [job for job in wave if job.key not in trained]
            for wave in (self.plan.originals, self.plan.controls)
        ]
        status = self.store.statuses(job.key for job in self.plan.cells)
        cells = [job for job in self.plan.cells if status.get(job.key) not in ("done", "failed")]
        finished = sum(len(wave) for wave in (self.plan.originals, self.plan.controls, self.plan.cells))
        finished -= sum(map(len, waves)) + len(cells)
        total = finished + sum(map(len, waves)) + len(cells)
        task = bar.add_task("training originals", total=total, completed=finished)
        if cells:
            for wave, title in zip(waves, ("training originals", "retraining controls"), strict=True):
                bar.update(task, description=title)
                for done in self.executor.run(wave):
                    self._trained(done, next(job for job in wave if job.key == done.key))
                    bar.advance(task)
        else:
            bar.advance(task, sum(map(len, waves)))
        by_key = {job.key: job for job in cells}
        bar.update(task, description="forgetting and auditing")
        for done in self.executor.run(self._ready(cells)):
            job = by_key.pop(done.key)
            self.store.put_cell(self._row(job, done))
            bar.advance(task)
        for job in by_key.values():
            reason = next(self.failed[key] for key in job.needs if key in self.failed)
            self.store.put_cell(
                self._row(job, Done(job.key, "crashed", f"its models could not be trained: {reason}"))
            )
            bar.advance(task)

    def _ready(self, cells: Sequence[Job]) -> list[Job]:
        """Cells whose models are there, with the mean time of retraining."""
        seconds = {key: row.seconds for key, row in self.store.artifacts().items()}
        ready: list[Job] = []
        for job in sorted(cells, key=lambda job: job.affinity):
            if any(key in self.failed for key in job.needs):
                continue
            times = [time for key in job.needs[1:] if (time := seconds.get(key)) is not None]
            ready.append(replace(job, retraining_seconds=float(np.mean(times)) if times else None))
        return ready

    def _trained(self, done: Done, job: Job) -> None:
        if done.status != "done":
            self.failed[done.key] = done.reason
            return
        place = str(place_of(job.folder, job.key).relative_to(job.folder))
        self.store.put_artifact(ArtifactRow(
            key=done.key, kind=job.kind, place=place, sha256=done.sha256, seconds=done.seconds, created=now()
        ))  # fmt: skip

    def _row(self, job: Job, done: Done) -> CellRow:
        report = done.report
        method = self.plan.methods[job.method].name if job.method >= 0 else ORIGINAL
        findings = [
            FindingRow(
                position=position, audit=item["audit"], name=item["name"], value=item["value"], k=item["k"],
                judgement=item["judgement"], content=item,
            )
            for position, item in enumerate(report.get("findings", []))
        ]  # fmt: skip
        series = [SeriesRow(name=name, rows=rows) for name, rows in report.get("series", {}).items()]
        return CellRow(
            key=job.key, method=method, label=job.title, request=str(report.get("facts", {}).get("request", "")),
            seeds=job.seeds, status=done.status, reason=done.reason, verdict=report.get("verdict"),
            reasons=report.get("reasons", []), facts=report.get("facts", {}), seconds=done.seconds,
            peak_bytes=done.peak_bytes, finished=now(), findings=findings, series=series,
        )  # fmt: skip


def _result(name: str, folder: Path, plan: Plan, workshop: Workshop, store: Store) -> StudyResult:
    rows = store.cells(job.key for job in plan.cells)
    cells: list[CellResult] = []
    for job in plan.cells:
        row = rows.get(job.key)
        method = plan.methods[job.method].name if job.method >= 0 else ORIGINAL
        request = workshop.splits[job.request].description
        report = _report(row) if row is not None and row.status == "done" else None
        cells.append(
            CellResult(
                job.key, method, job.title, request, dict(job.seeds), row.status if row else "waiting",
                row.reason if row else "", row.seconds if row else None, report,
            )
        )  # fmt: skip
    return StudyResult(name, folder, tuple(cells))


def _report(row: CellRow) -> AuditReport:
    return AuditReport.from_dict({
        "verdict": row.verdict,
        "reasons": row.reasons,
        "findings": [item.content for item in row.findings],
        "series": {item.name: item.rows for item in row.series},
        "facts": row.facts,
    })  # fmt: skip


def _locked(folder: Path, wait: bool, console: Console) -> FileLock:
    """The run folder's lock, which the system frees when its holder dies."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as problem:
        if not wait:
            raise RunLocked(
                f"Another process is working on {folder}; wait for it, or choose another folder."
            ) from problem
        console.print(f"Another process is working on {folder}; waiting for it.")
        lock.acquire()
    except OSError as problem:
        raise CannotWrite(f"Cannot lock {folder}: {problem.strerror}.") from problem
    return lock


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
