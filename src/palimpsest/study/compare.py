"""The main job: run a study's cells, resume what is there, and gather the result."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import URL

from palimpsest.audit.report import AuditReport
from palimpsest.core.errors import InvalidRecipe
from palimpsest.core.writing import check_writable
from palimpsest.study.executors import Executor, LocalExecutor, WorkersCannotStart
from palimpsest.study.folder import ARTIFACTS, DATABASE, RECIPE, keep_recipe, locked
from palimpsest.study.plan import Job, Plan
from palimpsest.study.recipe import Recipe, load_recipe
from palimpsest.study.result import CellResult, StudyResult
from palimpsest.study.running import Run
from palimpsest.study.store import Store
from palimpsest.study.tables import CellRow
from palimpsest.study.workshop import Workshop


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    workers: int | None = None,
    progress: bool = True,
    wait: bool = True,
    retry: bool = False,
    executor: Executor | None = None,
) -> StudyResult:
    """Compare methods with retraining on the requests of a recipe.

    Every cell (method x request x seed) is stored under the hash of all that determines it. A study that
    was interrupted, even by SIGKILL, goes on where it stood; one that was extended runs only what is new.

    Args:
        recipe: A `Recipe`, a mapping, or a YAML file.
        out: Folder of the run (recipe.yaml, study.sqlite, artifacts); "runs/<name>" by default.
        overrides: "key=value" changes of the recipe.
        workers: Processes, instead of the recipe's. A script must then call this under
            `if __name__ == "__main__"`.
        progress: Whether to draw a progress bar on standard error.
        wait: Whether to wait while another process works on the folder; else `RunLocked` is raised.
        retry: Whether cells that failed are run once more; those whose worker was killed always are.
        executor: Where jobs run, instead of the recipe's executor; the caller closes it.

    Raises:
        InvalidRecipe, UnknownName, InvalidSplit, MissingNeed, ...: Bad input, before any work.
        CannotWrite: If the folder or the store cannot be written.
        RunLocked: See `wait`.
    """
    _check_process()
    recipe = _recipe(recipe, overrides)
    folder = Path(out or Path("runs", re.sub(r"[^\w.-]+", "-", recipe.name))).absolute()
    workshop = Workshop(recipe)
    plan = workshop.plan(artifacts_of(recipe, folder))
    workshop.check()
    check_writable(folder)
    console = Console(stderr=True, quiet=not progress)
    with ExitStack() as stack:
        stack.enter_context(locked(folder, wait, console))
        keep_recipe(folder, recipe)
        store = Store(_database(recipe, folder))
        stack.callback(store.close)
        store.put_study(plan.key, recipe.name, recipe.plain(), [job.key for job in plan.cells])
        if executor is None:
            executor = LocalExecutor(recipe.workers if workers is None else workers)
            stack.callback(executor.close)
        again = ("crashed", "failed") if retry else ("crashed",)
        Run(plan, store, executor, stack.enter_context(_bar(console)), again).all()
        return _result(recipe, folder, plan, store)


def open_run(folder: str | Path) -> StudyResult:
    """The result of the study that was last run in a folder, as far as it has come.

    Raises:
        InvalidRecipe: If the folder holds no study.
    """
    folder = Path(folder).absolute()
    if not (folder / RECIPE).is_file():
        raise InvalidRecipe(f"{folder} holds no study: there is no {RECIPE} in it.")
    recipe = load_recipe(folder / RECIPE)
    plan = Workshop(recipe).plan(artifacts_of(recipe, folder))
    store = Store(_database(recipe, folder))
    try:
        return _result(recipe, folder, plan, store)
    finally:
        store.close()


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path, overrides: Iterable[str]) -> Recipe:
    changes = list(overrides)
    if isinstance(recipe, Recipe):
        return load_recipe(recipe.plain(), changes) if changes else recipe
    return load_recipe(recipe, changes)


def artifacts_of(recipe: Recipe, folder: Path) -> str:
    """Folder or URL of a study's weights."""
    return recipe.artifacts or str(folder / ARTIFACTS)


def _database(recipe: Recipe, folder: Path) -> str | URL:
    return recipe.store or URL.create("sqlite", database=str(folder / DATABASE))


def _check_process() -> None:
    """Refuse to start a study while a worker process imports the main program: it would wait for itself."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise WorkersCannotStart(
            'A script that calls compare with workers must do so under: if __name__ == "__main__".'
        )


def _result(recipe: Recipe, folder: Path, plan: Plan, store: Store) -> StudyResult:
    rows = store.cells(job.key for job in plan.cells)
    cells = tuple(_cell(recipe, plan, job, rows.get(job.key)) for job in plan.cells)
    return StudyResult(recipe.name, folder, cells)


def _cell(recipe: Recipe, plan: Plan, job: Job, row: CellRow | None) -> CellResult:
    names = {"study": recipe.name, "label": job.title, "request": plan.requests[job.request]}
    report = None if row is None or row.status != "done" else _report(row, names)
    about = (job.key, plan.method_name(job), job.title, names["request"], dict(job.seeds))
    if row is None:
        return CellResult(*about, "waiting")
    return CellResult(*about, row.status, row.reason, row.detail, row.seconds, row.peak_bytes, report)


def _report(row: CellRow, names: Mapping[str, str]) -> AuditReport:
    """The stored report, under the names that the recipe gives things now."""
    return AuditReport.from_dict({
        "verdict": row.verdict,
        "reasons": row.reasons,
        "findings": [item.content for item in row.findings],
        "series": {item.name: item.rows for item in row.series},
        "facts": {**row.facts, **names},
    })  # fmt: skip


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )  # fmt: skip
