"""The leaderboard: methods tuned on one request, reported on others, board by board, against retraining."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, JsonValue, ValidationError
from sqlalchemy import URL

from palimpsest.core.errors import InvalidRecipe
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.core.writing import check_writable, write_text
from palimpsest.study.compare import compare
from palimpsest.study.folder import ARTIFACTS, DATABASE
from palimpsest.study.headline import FIGURES, UTILITY, gap, value
from palimpsest.study.plan import ORIGINAL, RETRAIN
from palimpsest.study.recipe import Recipe, content_hash, load_recipe
from palimpsest.study.replication import versions
from palimpsest.study.request import Part
from palimpsest.study.result import CellResult, Mean, StudyResult, mean_and_half_width
from palimpsest.study.tuned import Tuned, with_tuned
from palimpsest.study.tuning import tune
from palimpsest.study.yaml_text import read_yaml
from palimpsest.suites.benchmark import BENCHMARKS, Benchmark

COLUMNS = {
    "retain": "retained accuracy",
    "test": "test accuracy",
    "gap forget": "forget accuracy gap",
    "gap likelihood": "forget likelihood gap",
    "gap membership": "membership AUC gap",
    "gap relearning": "relearning gap",
    "gap representation": "representation gap",
    "share": "share of retraining",
}
PERCENT = ("retain", "test", "gap forget", "share")
_Board = TypeVar("_Board")


class Board(Part):
    """One setting of a leaderboard.

    Attributes:
        title: In words.
        bench: A benchmark that fills in the recipe, and the settings that the first trial of a method takes.
        recipe: Data, model, training and split of a study; seeds and methods come from the leaderboard.
        tune: Requests that hyperparameters are searched on.
        forget: Requests that are reported.
        skip: Methods that cannot run here, with the reason.
        settings: Of methods that need to be told something here; they are not searched.
        trials: Of the search, if not as the leaderboard says.
    """

    title: str
    bench: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    tune: list[JsonValue] = Field(min_length=1)
    forget: list[JsonValue] = Field(min_length=1)
    skip: dict[str, str] = Field(default_factory=dict[str, str])
    settings: dict[str, dict[str, JsonValue]] = Field(default_factory=dict[str, dict[str, JsonValue]])
    trials: int | None = Field(default=None, ge=1)


class Leaderboard(Part):
    """A file of `leaderboards/`.

    Attributes:
        name: Of the results.
        title: In words.
        methods: By name, with settings that are not searched; all for the task if there are none.
        skip: Methods that are left out of all boards, with the reason.
        seeds: Number of seeds that are reported.
        trials: Of the search, per method.
        budget: Largest share of the retraining time.
        boards: By key.
    """

    name: str
    title: str
    methods: list[JsonValue] = Field(default_factory=list[JsonValue])
    skip: dict[str, str] = Field(default_factory=dict[str, str])
    seeds: int = Field(default=3, ge=1)
    trials: int = Field(default=10, ge=1)
    budget: float = Field(default=1.0, gt=0)
    boards: dict[str, Board] = Field(min_length=1)


def load_leaderboard(path: str | Path) -> Leaderboard:
    """A leaderboard from its file.

    Raises:
        InvalidRecipe: If it cannot be used.
    """
    try:
        return Leaderboard.model_validate(read_yaml(Path(path).read_text(encoding="utf-8")))
    except OSError as problem:
        raise InvalidRecipe(f"Cannot read the leaderboard {path}: {problem.strerror}.") from problem
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as problem:
        raise InvalidRecipe(f"The leaderboard {path} cannot be used: {problem}") from problem


def run_leaderboard(
    source: str | Path | Leaderboard,
    out: str | Path,
    results: str | Path,
    boards: Sequence[str] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Tune and compare on every board, and write "<name>.json" and "<name>.md" after each.

    Everything resumes; boards that are not asked for keep what the results already hold of them.

    Args:
        source: A leaderboard or its file.
        out: Folder of searches and studies.
        results: Folder of the results.
        boards: Keys of the boards to run; all by default.
        workers: Processes.
        progress: Whether to draw progress bars.

    Returns:
        The JSON file.

    Raises:
        InvalidRecipe, UnknownName: If something cannot be run; before that board's work.
        CannotWrite: If results cannot be written.
    """
    board = source if isinstance(source, Leaderboard) else load_leaderboard(source)
    wanted = chosen_boards(board.boards, boards)
    recipes = {key: _recipes(board, settings) for key, settings in wanted.items()}
    folder, target = Path(out), check_writable(Path(results)) / f"{board.name}.json"
    written = _read(target)
    for key, settings in wanted.items():
        searched, reported = recipes[key]
        tuned = tune(
            searched, folder / key / "tuning", settings.trials or board.trials, budget=board.budget,
            workers=workers, progress=progress, first=_first(settings, searched),
        )  # fmt: skip
        result = compare(
            *_placed(with_tuned(reported, tuned), folder / key / "compare"),
            workers=workers,
            progress=progress,
        )
        written[key] = _entry(board, settings, tuned, result)
        ordered = {name: written[name] for name in board.boards if name in written}
        content = {
            "name": board.name, "title": board.title, "seeds": board.seeds, "budget": board.budget,
            "boards": ordered,
        }  # fmt: skip
        write_text(target, json.dumps(content, indent=1) + "\n")
        write_text(target.with_suffix(".md"), to_markdown(content))
    return target


def chosen_boards(boards: Mapping[str, _Board], wanted: Sequence[str] | None) -> dict[str, _Board]:
    """The boards that are asked for, in that order; all by default.

    Raises:
        InvalidRecipe: For a key that there is no board of.
    """
    keys = list(boards) if wanted is None else list(wanted)
    unknown = [key for key in keys if key not in boards]
    if unknown:
        raise InvalidRecipe(f"The leaderboard has no board '{unknown[0]}'; it has {', '.join(boards)}.")
    return {key: boards[key] for key in keys}


def to_markdown(content: Mapping[str, Any]) -> str:
    """The results as a page: one table per request."""
    lines = [
        f"# {content['title']}", "",
        f"Means over {content['seeds']} seeds with half of the 95 % interval; a gap is the distance to models "
        "retrained without the records (mean over seeds). Accuracies, their gaps and cost in percent. Hyperparameters "
        f"come from a search on another request, within a budget of {content['budget']:g} times the retraining time. "
        "Shares of retraining are ratios of seconds, which depend on what else the machine did. "
        f"Written by `palimpsest leaderboard leaderboards/{content['name']}.yaml`.", "",
    ]  # fmt: skip
    for entry in content["boards"].values():
        lines += [
            f"## {entry['title']}",
            "",
            f"{entry['setting']} Tuned on: {', '.join(entry['tuned_on'])}.",
            "",
        ]
        for request, rows in entry["requests"].items():
            columns = [key for key in COLUMNS if any(key in row["figures"] for row in rows)]
            headings = " | ".join(COLUMNS[key] for key in columns)
            lines += [f"### {request}", "", f"| method | verdicts | {headings} |"]
            lines += ["|---|---|" + "---:|" * len(columns)]
            for row in rows:
                figures = [_shown(key, row["figures"].get(key)) for key in columns]
                verdicts = ", ".join(
                    f"{word} {n}" for word, n in sorted(row["verdicts"].items(), key=lambda v: -v[1])
                )
                failed = f"failed: {row['failures'][0]}" if row["failures"] else ""
                said = "; ".join(part for part in (verdicts, failed) if part)
                lines.append(f"| {row['label']} | {said} | " + " | ".join(figures) + " |")
            lines.append("")
        lines += ["Settings: " + "; ".join(_settings(entry["tuned"])) + ".", ""]
        if entry["skipped"]:
            said = "; ".join(f"{name}: {why}" for name, why in entry["skipped"].items())
            lines += [f"Not among the rows: {said}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _recipes(board: Leaderboard, settings: Board) -> tuple[Recipe, Recipe]:
    """The study to tune on, and the one to report."""
    skipped = {**board.skip, **settings.skip}
    for name in (*skipped, *settings.settings):
        UNLEARNERS.get(name)
    bench = BENCHMARKS.get(settings.bench) if settings.bench else None
    tree = {**(bench.recipe(None, None) if bench else {}), **settings.recipe}
    task = _name(tree.get("task", "classification"))
    everything = [
        name
        for name, cls in UNLEARNERS.items()
        if {"any", task} & set(cls.card.tasks) and cls.__module__.startswith("palimpsest.forget.")
    ]
    methods = [
        _told(item, {**_fixed(bench, _name(item)), **settings.settings.get(_name(item), {})})
        for item in (board.methods or everything)
        if _name(item) not in {*skipped, RETRAIN}
    ]
    common = {**tree, "methods": methods, "keep_models": False}
    searched = load_recipe({**common, "forget": settings.tune, "seeds": 1, "name": f"{board.name}, tuning"})
    reported = load_recipe(
        {**common, "forget": settings.forget, "seeds": board.seeds, "name": f"{board.name}: {settings.title}"}
    )
    return searched, reported


def _fixed(bench: Benchmark | None, method: str) -> dict[str, Any]:
    """What a benchmark sets and the method does not search."""
    if bench is None:
        return {}
    searched = UNLEARNERS.get(method).card.search
    return {key: value for key, value in bench.settings(method).items() if key not in searched}


def _first(settings: Board, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Settings of the first trial by title of the method: the benchmark's, of what is searched."""
    if settings.bench is None:
        return {}
    bench = BENCHMARKS.get(settings.bench)
    first: dict[str, dict[str, Any]] = {}
    for method in recipe.methods:
        searched = UNLEARNERS.get(method.name).card.search
        given = bench.settings(method.name)
        first[method.title] = {key: value for key, value in given.items() if key in searched}
    return first


def _placed(recipe: Recipe, folder: Path) -> tuple[Recipe, Path]:
    """The recipe with a store that all of a board's settings share, and a folder of these settings alone."""
    database = (check_writable(folder) / DATABASE).absolute()
    shared = {
        "store": URL.create("sqlite", database=str(database)).render_as_string(),
        "artifacts": str((folder / ARTIFACTS).absolute()),
    }
    return recipe.model_copy(update=shared), folder / content_hash(recipe.plain())


def _name(method: Any) -> str:
    return method["name"] if isinstance(method, dict) else str(method)


def _told(method: Any, settings: Mapping[str, Any]) -> Any:
    """A method with what a board tells it, under its own name."""
    if not settings:
        return method
    given = method if isinstance(method, dict) else {"name": method}
    return {"label": given["name"], **given, "settings": {**given.get("settings", {}), **settings}}


def _entry(board: Leaderboard, settings: Board, tuned: Tuned, result: StudyResult) -> dict[str, Any]:
    requests: dict[str, list[dict[str, Any]]] = {}
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for cell in result.cells:
        groups.setdefault((cell.request, cell.label), []).append(cell)
    for (request, label), cells in groups.items():
        requests.setdefault(request, []).append({"label": label, "method": cells[0].method, **_row(cells)})
    for rows in requests.values():
        rows.sort(key=_rank)
    bench = BENCHMARKS.get(settings.bench).recipe(None, None) if settings.bench else {}
    tree = {"data": "digits", "model": "small_cnn", **bench, **settings.recipe}
    data, model = tree["data"], tree["model"]
    return {
        "title": settings.title,
        "setting": f"Data: {_said(data)}; model: {_said(model)}.",
        "tuned_on": tuned.requests,
        "tuned": {
            label: {"settings": item.settings, "validation_gap": item.gap, "share": item.share,
                    "within_budget": item.within_budget, "trials": len(item.trials)}
            for label, item in tuned.methods.items()
        },
        "requests": requests,
        "skipped": {**board.skip, **settings.skip},
        "versions": versions(),
    }  # fmt: skip


def _row(cells: Sequence[CellResult]) -> dict[str, Any]:
    verdicts: dict[str, int] = {}
    for cell in cells:
        if cell.report is not None:
            verdicts[cell.report.verdict.value] = verdicts.get(cell.report.verdict.value, 0) + 1
    figures: dict[str, list[float | None]] = {
        **{name: [value(cell, name) for cell in cells] for name in UTILITY},
        **{f"gap {name}": [gap(cell, name) for cell in cells] for name in FIGURES if name not in UTILITY},
        "share": [cell.share for cell in cells],
    }
    means = {
        key: mean_and_half_width(known)
        for key, values in figures.items()
        if (known := [value for value in values if value is not None])
    }
    return {
        "verdicts": verdicts,
        "figures": {key: _plain(mean) for key, mean in means.items()},
        "failures": [cell.reason for cell in cells if cell.report is None],
    }


def _rank(row: Mapping[str, Any]) -> tuple[int, float]:
    """The two ends of the scale first, then by the mean of the gaps, test accuracy lost counting as one."""
    ends = {ORIGINAL: 0, RETRAIN: 1}
    gaps = [mean["mean"] for key, mean in row["figures"].items() if key.startswith("gap")]
    return ends.get(row["method"], 2), sum(gaps) / len(gaps) if gaps else float("inf")


def _plain(mean: Mean) -> dict[str, float | int | None]:
    return dict(zip(("mean", "half_width", "n"), mean, strict=True))


def _said(named: Any) -> str:
    if not isinstance(named, dict):
        return str(named)
    settings = named.get("settings") or {}
    return f"{named['name']}" + (
        f" ({', '.join(f'{k} {v}' for k, v in settings.items())})" if settings else ""
    )


def _settings(tuned: Mapping[str, Any]) -> list[str]:
    return [
        f"{label} {', '.join(f'{key} {value}' for key, value in item['settings'].items()) or 'as by default'}"
        + ("" if item["within_budget"] else " (over the budget)")
        for label, item in tuned.items()
    ]


def _shown(key: str, mean: Mapping[str, Any] | None) -> str:
    if mean is None:
        return ""
    unit, digits = (100, 1) if key in PERCENT else (1, 2)
    half = "" if mean["half_width"] is None else f" ±{unit * mean['half_width']:.{digits}f}"
    return f"{unit * mean['mean']:.{digits}f}{half}"


def _read(path: Path) -> dict[str, Any]:
    """Boards that were written earlier."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["boards"]
    except (ValueError, KeyError, TypeError) as problem:
        raise InvalidRecipe(f"{path} holds no results of a leaderboard: move it away.") from problem
