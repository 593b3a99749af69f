"""Replications: published claims, run at small scale over several seeds, and written down as they come out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError

import palimpsest
from palimpsest.core.errors import InvalidRecipe, UnknownName
from palimpsest.core.writing import check_writable, write_text
from palimpsest.study.claims import MEASUREMENTS, Setting
from palimpsest.study.claims.claim import Claim, Figure, Judged, judge_unit
from palimpsest.study.claims.learned import LEARNED
from palimpsest.study.compare import artifacts_of, compare
from palimpsest.study.plan import ORIGINAL, methods_of
from palimpsest.study.recipe import Recipe, content_hash, load_recipe
from palimpsest.study.request import Part
from palimpsest.study.result import CellResult, StudyResult
from palimpsest.study.retain import RetainRecipe, load_retain_recipe, retain
from palimpsest.study.retain.figures import RetainStudied
from palimpsest.study.workshop import Workshop
from palimpsest.study.yaml_text import read_yaml

if TYPE_CHECKING:
    from rich.table import Table

HERE = Path("replications")
SOURCE = Path(__file__).parents[3] / "replications"
"""Beside the source code, for an installation from a clone."""
RESULTS = "results"
OWN_FIGURES = ("seconds", "share_of_retraining")
"""Figures of a cell that no audit measures."""


class Replicated(Part):
    """What is replicated.

    Attributes:
        title: Of the paper.
        venue: Where it was published.
        arxiv: Its number there.
    """

    title: str
    venue: str = ""
    arxiv: str | None = None


class Replication(Part):
    """A file of `replications/`.

    Attributes:
        slug: Name of the file.
        paper: What is replicated.
        setting: Data, model and scale, in words.
        studies: Recipes by name.
        claims: What must hold.
    """

    slug: str
    paper: Replicated
    setting: str
    studies: dict[str, dict[str, Any]]
    claims: list[Claim] = Field(min_length=1)


@dataclass(frozen=True)
class ReplicationResult:
    """All claims of a replication, judged.

    Attributes:
        replication: What was run.
        claims: In order.
        seeds: Number of seeds.
        seconds: That it took; less if results of an earlier run were reused.
        path: Where it was written.
    """

    replication: Replication
    claims: tuple[Judged, ...]
    seeds: int
    seconds: float
    path: Path

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(claim.passed for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "slug": self.replication.slug,
            "paper": self.replication.paper.model_dump(),
            "setting": self.replication.setting,
            "seeds": self.seeds,
            "seconds": round(self.seconds, 1),
            "passed": self.passed,
            "versions": versions(),
            "claims": [claim.to_dict() for claim in self.claims],
        }

    def table(self) -> Table:
        """Claim, the paper's figure, our figure and the judgement, for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.replication.paper.title} ({self.replication.paper.venue}), {self.seeds} seeds"
        table = Table(title=escape(title), title_justify="left", show_lines=True)
        for heading in ("claim", "paper", "ours", "held", ""):
            table.add_column(heading, overflow="fold")
        for judged in self.claims:
            word = "[green]pass[/green]" if judged.passed else "[red]FAIL[/red]"
            held = f"{judged.held} of {len(judged.units)}"
            said = (judged.claim.statement, judged.claim.paper, judged.ours, held)
            table.add_row(*map(escape, said), word)
        return table


def replicate(
    slug: str | Path,
    out: str | Path | None = None,
    seeds: int | Sequence[int] = 3,
    workers: int = 2,
    progress: bool = True,
    results: str | Path | None = None,
) -> ReplicationResult:
    """Run a replication's studies, judge its claims, and write what came out.

    Args:
        slug: Name of a file in `replications/`, or a path to one.
        out: Folder of the studies, which resume; "runs/replications/<slug>" by default.
        seeds: Number of seeds, or a list.
        workers: Processes.
        progress: Whether to draw progress bars.
        results: Folder of the result, "<slug>.json"; "results" beside the recipe by default.

    Raises:
        UnknownName: If there is no such replication; suggests the nearest.
        InvalidRecipe: If the file cannot be used.
        CannotWrite: If results cannot be written.
    """
    start = time.perf_counter()
    path = find(slug)
    replication = load_replication(path)
    folder = check_writable(path.parent / RESULTS if results is None else results)
    root = Path(out or Path("runs", "replications", replication.slug))
    recipes = {name: _recipe(name, tree, seeds) for name, tree in replication.studies.items()}
    _check(replication, recipes)
    studied: dict[str, Studied | RetainStudied] = {}
    for name, recipe in recipes.items():
        place = root / _folder_name(name, recipe)
        if isinstance(recipe, RetainRecipe):
            studied[name] = RetainStudied(retain(recipe, place, workers=workers, progress=progress), recipe)
        else:
            studied[name] = Studied(recipe, compare(recipe, place, workers=workers, progress=progress))
    claims = tuple(judge(claim, studied[claim.study]) for claim in replication.claims)
    count = len(next(iter(recipes.values())).seeds)
    target = folder / f"{replication.slug}.json"
    result = ReplicationResult(replication, claims, count, time.perf_counter() - start, target)
    write_text(target, json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def known_replications(folder: str | Path | None = None) -> dict[str, Path]:
    """Files of replications by slug: of a folder, or of `replications/` here and beside the source."""
    places = [Path(folder)] if folder is not None else [SOURCE, HERE]
    return {path.stem: path for place in places for path in sorted(place.glob("*.yaml"))}


def find(slug: str | Path) -> Path:
    """The file of a replication.

    Raises:
        UnknownName: If there is none; suggests the nearest.
    """
    if Path(slug).suffix in (".yaml", ".yml") and Path(slug).is_file():
        return Path(slug)
    known = known_replications()
    if str(slug) not in known:
        raise UnknownName("replication", str(slug), known)
    return known[str(slug)]


def load_replication(path: Path) -> Replication:
    """A replication from its file.

    Raises:
        InvalidRecipe: If it cannot be used.
    """
    try:
        return Replication.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as problem:
        raise InvalidRecipe(f"The replication {path} cannot be used: {problem}") from problem


def judge(claim: Claim, studied: Studied | RetainStudied) -> Judged:
    """A claim on every request (or stream) and seed of its study."""
    metrics = [
        *(condition.metric for condition in claim.conditions),
        *([claim.metric] if claim.metric else []),
    ]
    units = studied.units()
    if isinstance(studied, RetainStudied) and all("@" in metric for metric in metrics):
        units = studied.once()
    return Judged(claim, tuple(judge_unit(claim, *key, figure) for key, figure in units.items()))


class Studied:
    """A study that was run, and the figures that can be read off it.

    Args:
        recipe: Of the study.
        result: What came of it.
    """

    def __init__(self, recipe: Recipe, result: StudyResult):
        self.result = result
        self.workshop = Workshop(recipe)
        plan = self.workshop.plan(artifacts_of(recipe, result.folder))
        self.jobs = {job.key: job for job in plan.cells}
        self.measured: dict[tuple[str, str], float] = {}

    def units(self) -> dict[tuple[str, int], Figure]:
        """The figures of every request and seed."""
        groups: dict[tuple[str, int], dict[str, CellResult]] = {}
        for cell in self.result.cells:
            groups.setdefault((cell.request, cell.seeds["training"]), {})[cell.label] = cell
        return {key: partial(self.figure, cells) for key, cells in groups.items()}

    def figure(self, cells: Mapping[str, CellResult], label: str, metric: str) -> float | None:
        """A figure of a method, among the cells of one request and seed; None if it was not measured."""
        cell = cells[label]
        kind, _, name = metric.rpartition(":")
        if kind == "measure":
            return self._measure(cell, name)
        if kind == "k":
            return cell.k(name)
        if metric in OWN_FIGURES:
            return cell.share if metric == "share_of_retraining" else cell.seconds
        return cell.value(metric)

    def _measure(self, cell: CellResult, name: str) -> float:
        if (cell.key, name) not in self.measured:
            job = self.jobs[cell.key]
            runtime = self.workshop.runtime(cell.seeds["unlearning"])
            parts, task = self.workshop.splits[job.request], self.workshop.task
            with runtime.limited():
                setting = Setting(self.workshop.original(job), parts, task, runtime)
                self.measured[cell.key, name] = MEASUREMENTS.get(name)(setting)
        return self.measured[cell.key, name]


def versions() -> dict[str, str]:
    """Of everything that figures depend on."""
    found = {"palimpsest": palimpsest.__version__, "python": platform.python_version()}
    for library in ("torch", "numpy", "scikit-learn"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "unknown"
    return {**found, "system": f"{platform.system()} {platform.machine()}"}


def _recipe(name: str, tree: Mapping[str, Any], seeds: int | Sequence[int]) -> Recipe | RetainRecipe:
    whole = {"name": name, **tree, "seeds": seeds if isinstance(seeds, int) else list(seeds)}
    return load_retain_recipe(whole) if tree.get("kind") == "retain" else load_recipe(whole)


def _folder_name(name: str, recipe: Recipe | RetainRecipe) -> str:
    """One folder per recipe, so that a changed one starts afresh; more seeds go into the same."""
    said = {key: value for key, value in recipe.plain().items() if key != "seeds"}
    return f"{name}-{content_hash(said)[:8]}"


def _check(replication: Replication, recipes: Mapping[str, Recipe | RetainRecipe]) -> None:
    """Check that claims speak of studies, methods and measurements that exist.

    Raises:
        UnknownName: Naming what does not; suggests the nearest.
    """
    for claim in replication.claims:
        if claim.study not in recipes:
            raise UnknownName(f"study in the claim '{claim.name}'", claim.study, recipes)
        recipe = recipes[claim.study]
        methods = recipe.methods if isinstance(recipe, RetainRecipe) else methods_of(recipe)
        known = {method.title for method in methods} | {ORIGINAL}
        bases = [condition.minus for condition in claim.conditions if condition.minus]
        for label in (*claim.labels, *bases):
            if label not in known:
                raise UnknownName(f"method in the claim '{claim.name}'", label, known)
        for condition in claim.conditions:
            kind, _, name = condition.metric.partition(":")
            if kind == "measure" and isinstance(recipe, RetainRecipe):
                LEARNED.get(name.partition("@")[0])
            elif kind == "measure":
                MEASUREMENTS.get(name)
