"""Running a study of continual learning: what has no result yet, from where it was left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import URL

from palimpsest.core.errors import CannotWrite, InvalidRecipe
from palimpsest.core.writing import check_writable, write_text
from palimpsest.study.control import place_of
from palimpsest.study.executors import Executor, LocalExecutor
from palimpsest.study.folder import ARTIFACTS, DATABASE, RECIPE, locked
from palimpsest.study.plan import Job
from palimpsest.study.recipe import content_hash, read_tree
from palimpsest.study.retain.recipe import RetainRecipe, load_retain_recipe
from palimpsest.study.retain.result import RetainCell, RetainResult
from palimpsest.study.retain.workshop import RetainWorker, RetainWorkshop, state_of
from palimpsest.study.store import Store
from palimpsest.study.tables import ArtifactRow, CellRow, FindingRow, SeriesRow, now
from palimpsest.study.workshop import Done

OUTCOME = "outcome"
"""Name of the series that holds all that came of a cell."""


def retain(
    recipe: RetainRecipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    workers: int | None = None,
    progress: bool = True,
    wait: bool = True,
    retry: bool = False,
    executor: Executor | None = None,
) -> RetainResult:
    """Run the learners of a recipe over its streams.

    A study that was interrupted, even by SIGKILL, goes on after the last experience that was finished, to the
    same result; one that was extended runs only what is new.

    Args:
        recipe: A `RetainRecipe`, a mapping, or a YAML file.
        out: Folder of the run; "runs/<name>" by default.
        overrides: "key=value" changes of the recipe.
        workers: Processes, instead of the recipe's. A script must then call this under
            `if __name__ == "__main__"`.
        progress: Whether to draw a progress bar on standard error.
        wait: Whether to wait while another process works on the folder; else `RunLocked` is raised.
        retry: Whether cells that failed are run once more.
        executor: Where cells run, instead of local processes; the caller closes it.

    Raises:
        InvalidRecipe, UnknownName, InvalidStream, ...: Bad input, before any work.
        CannotWrite: If the folder or the store cannot be written.
        RunLocked: See `wait`.
    """
    recipe = load_retain_recipe(recipe, overrides)
    folder = Path(out or Path("runs", re.sub(r"[^\w.-]+", "-", recipe.name))).absolute()
    workshop = RetainWorkshop(recipe)
    jobs = workshop.jobs(str(folder / ARTIFACTS))
    workshop.check()
    check_writable(folder)
    console = Console(stderr=True, quiet=not progress)
    with ExitStack() as stack:
        stack.enter_context(locked(folder, wait, console))
        _keep_recipe(folder, recipe)
        store = Store(_database(recipe, folder))
        stack.callback(store.close)
        keys = [job.key for job in jobs]
        store.put_study(content_hash(keys), recipe.name, recipe.plain(), keys)
        if executor is None:
            executor = LocalExecutor(recipe.workers if workers is None else workers, RetainWorker)
            stack.callback(executor.close)
        bar = stack.enter_context(
            Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
            )
        )  # fmt: skip
        _run(recipe, jobs, store, executor, bar, retry)
        return _result(recipe, folder, jobs, store)


def open_retain(folder: str | Path) -> RetainResult:
    """The result of the study that was last run in a folder, as far as it has come.

    Raises:
        InvalidRecipe: If the folder holds no study of continual learning.
    """
    folder = Path(folder).absolute()
    if not is_retain_run(folder):
        raise InvalidRecipe(f"{folder} holds no study of continual learning.")
    recipe = load_retain_recipe(folder / RECIPE)
    jobs = RetainWorkshop(recipe).jobs(str(folder / ARTIFACTS))
    store = Store(_database(recipe, folder))
    try:
        return _result(recipe, folder, jobs, store)
    finally:
        store.close()


def is_retain_run(folder: Path) -> bool:
    """Whether a folder holds a study of continual learning."""
    if not (folder / RECIPE).is_file():
        return False
    tree = read_tree(folder / RECIPE)
    return isinstance(tree, dict) and tree.get("kind") == "retain"


def _run(
    recipe: RetainRecipe, jobs: Sequence[Job], store: Store, executor: Executor, bar: Progress, retry: bool
) -> None:
    """Run what has no result; each cell is stored when it is done, and its state is removed then."""
    again = {"waiting", "crashed"} | ({"failed"} if retry else set[str]())
    status = store.statuses(job.key for job in jobs)
    ready = [job for job in jobs if status.get(job.key, "waiting") in again]
    by_key = {job.key: job for job in ready}
    task = bar.add_task("learning", total=len(jobs), completed=len(jobs) - len(ready))
    for done in executor.run(ready):
        if done.status == "unwritable":
            raise CannotWrite(done.reason)
        job = by_key[done.key]
        artifact = None
        if done.sha256:
            artifact = ArtifactRow(
                key=job.key, kind="learner", place=place_of(job.place, job.key), sha256=done.sha256,
                seconds=done.seconds, created=now(),
            )  # fmt: skip
        store.put_cell(_row(recipe, job, done), artifact)
        if done.status == "done":
            state_of(job).unlink(missing_ok=True)
        bar.advance(task)


def _row(recipe: RetainRecipe, job: Job, done: Done) -> CellRow:
    measures: dict[str, float | None] = done.report.get("measures", {})
    findings = [
        FindingRow(
            position=position, audit="retain", name=name, value=value, k=None, judgement="measured",
            content={"name": name, "value": value},
        )
        for position, (name, value) in enumerate(measures.items())
    ]  # fmt: skip
    series = [SeriesRow(name=OUTCOME, rows=[done.report])] if done.report else []
    return CellRow(
        key=job.key, method=recipe.methods[job.method].name, label=job.title, request=recipe.streams[job.request],
        seeds=job.seeds, status=done.status, reason=done.reason, detail=done.detail, verdict=None, reasons=[],
        facts={"study": recipe.name, "data": recipe.data.name, "model": recipe.model.name},
        seconds=done.seconds, peak_bytes=done.peak_bytes, started=done.started, finished=now(),
        findings=findings, series=series,
    )  # fmt: skip


def _result(recipe: RetainRecipe, folder: Path, jobs: Sequence[Job], store: Store) -> RetainResult:
    rows = store.cells(job.key for job in jobs)
    return RetainResult(recipe.name, folder, tuple(_cell(recipe, job, rows.get(job.key)) for job in jobs))


def _cell(recipe: RetainRecipe, job: Job, row: CellRow | None) -> RetainCell:
    about = (
        job.key, recipe.methods[job.method].name, job.title, recipe.streams[job.request], job.seeds["training"],
    )  # fmt: skip
    if row is None:
        return RetainCell(*about, "waiting")
    outcome: dict[str, Any] = next((item.rows[0] for item in row.series if item.name == OUTCOME), {})
    return RetainCell(*about, row.status, row.reason, row.detail, row.seconds, row.peak_bytes, outcome)


def _keep_recipe(folder: Path, recipe: RetainRecipe) -> None:
    """Write the recipe into its folder.

    Raises:
        InvalidRecipe: If the folder holds another kind of study, or one on other data.
    """
    path = folder / RECIPE
    if path.is_file():
        if not is_retain_run(folder):
            raise InvalidRecipe(f"{folder} holds another kind of study; choose another folder.")
        old = load_retain_recipe(path)
        for key in ("data", "test_data", "model", "order", "pretraining"):
            if getattr(old, key) != getattr(recipe, key):
                raise InvalidRecipe(f"{folder} holds another study ({key} differs); choose another folder.")
    if not path.is_file() or path.read_text(encoding="utf-8") != recipe.to_yaml():
        write_text(path, recipe.to_yaml())


def _database(recipe: RetainRecipe, folder: Path) -> str | URL:
    return recipe.store or URL.create("sqlite", database=str(folder / DATABASE))
