"""The leaderboard of learners: tuned on one stream, reported on others, at equal memory and equal passes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from palimpsest.core.errors import InvalidRecipe
from palimpsest.core.writing import check_writable, write_text
from palimpsest.retain.learner import LEARNERS
from palimpsest.study.leaderboard import chosen_boards
from palimpsest.study.recipe import read_tree
from palimpsest.study.replication import versions
from palimpsest.study.request import Part
from palimpsest.study.retain.recipe import LearnerOfStudy, RetainRecipe, load_retain_recipe
from palimpsest.study.retain.result import SHOWN, RetainResult, shown
from palimpsest.study.retain.verb import retain
from palimpsest.study.retain.workshop import RetainWorkshop


class Searched(LearnerOfStudy):
    """A learner of the leaderboard.

    Attributes:
        search: Values to try of its settings; every combination is tried with every learning rate.
        rates: Learning rates to try, instead of the board's.
    """

    rates: list[float] | None = None

    search: dict[str, list[Any]] = Field(default_factory=dict[str, list[Any]])


class RetainBoard(Part):
    """One setting of the leaderboard.

    Attributes:
        title: In words.
        recipe: Data, stream, model and training of a study; seeds and methods come from the leaderboard.
        tune: What differs where hyperparameters are searched: other data, or another stream.
        rates: Learning rates to try.
        skip: Learners that cannot run here, with the reason.
        note: What a reader should know before comparing rows.
    """

    title: str
    note: str = ""
    recipe: dict[str, Any]
    tune: dict[str, Any] = Field(min_length=1)
    rates: list[float] = Field(min_length=1)
    skip: dict[str, str] = Field(default_factory=dict[str, str])


class RetainLeaderboard(Part):
    """A file of `leaderboards/` about learners.

    Attributes:
        name: Of the results.
        title: In words.
        memory: Records that every learner with a buffer keeps.
        seeds: Number of seeds that are reported; the search takes a seed of its own, the one after them.
        methods: Learners with what is searched.
        boards: By key.
    """

    kind: Literal["retain"] = "retain"
    name: str
    title: str
    memory: int = Field(default=200, ge=1)
    seeds: int = Field(default=3, ge=1)
    methods: list[Searched] = Field(min_length=1)
    boards: dict[str, RetainBoard] = Field(min_length=1)


def is_retain_leaderboard(path: str | Path) -> bool:
    """Whether a file is a leaderboard of learners."""
    try:
        tree = read_tree(Path(path))
    except InvalidRecipe:
        return False
    return isinstance(tree, dict) and tree.get("kind") == "retain"


def load_retain_leaderboard(path: str | Path) -> RetainLeaderboard:
    """A leaderboard of learners from its file.

    Raises:
        InvalidRecipe: If it cannot be used.
    """
    try:
        return RetainLeaderboard.model_validate(read_tree(Path(path)))
    except (yaml.YAMLError, ValidationError) as problem:
        raise InvalidRecipe(f"The leaderboard {path} cannot be used: {problem}") from problem


def run_retain_leaderboard(
    leaderboard: RetainLeaderboard,
    out: str | Path,
    results: str | Path,
    boards: Sequence[str] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Search and report on every board, and write "<name>.json" and "<name>.md" after each.

    Everything resumes; boards that are not asked for keep what the results already hold of them.

    Args:
        leaderboard: What to run.
        out: Folder of searches and studies.
        results: Folder of the results.
        boards: Keys of boards to run; all by default.
        workers: Processes.
        progress: Whether to draw progress bars.

    Raises:
        InvalidRecipe, UnknownName, ...: Bad input, before any work.
    """
    chosen = chosen_boards(leaderboard.boards, boards)
    searches = {key: search_recipe(leaderboard, board) for key, board in chosen.items()}
    untuned = {method.name: method for method in leaderboard.methods}
    for key, board in chosen.items():  # what could be refused is refused before the first search
        RetainWorkshop(searches[key]).check()
        RetainWorkshop(report_recipe(leaderboard, board, untuned, key)).check()
    path = Path(results) / f"{leaderboard.name}.json"
    check_writable(path.parent)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept: dict[str, Any] = content.get("boards", {})
    for key, board in chosen.items():
        place = Path(out) / key
        best = best_of(
            retain(searches[key], place / "search", workers=workers, progress=progress), searches[key]
        )
        recipe = report_recipe(leaderboard, board, best, key)
        result = retain(recipe, place / "report", workers=workers, progress=progress)
        wanted = [method.name for method in leaderboard.methods if method.name not in board.skip]
        kept[key] = _entry(board, wanted, best, result)
        content = {
            "name": leaderboard.name,
            "title": leaderboard.title,
            "memory": leaderboard.memory,
            "seeds": leaderboard.seeds,
            "versions": versions(),
            "boards": {name: kept[name] for name in leaderboard.boards if name in kept},
        }
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_text(path.with_suffix(".md"), to_markdown(content))
    return path


def search_recipe(leaderboard: RetainLeaderboard, board: RetainBoard) -> RetainRecipe:
    """Every learner with every combination, on the stream of the search, with one seed that is not reported."""
    methods = [
        {
            "name": method.name,
            "label": f"{method.name} | {json.dumps({'lr': rate, **values}, sort_keys=True)}",
            "settings": _settings(leaderboard, method) | values,
            "training": {**method.training, "lr": rate},
        }
        for method in leaderboard.methods
        if method.name not in board.skip
        for rate in method.rates or board.rates
        for values in _combinations(method.search)
    ]
    return load_retain_recipe(
        {"kind": "retain", **board.recipe, **board.tune, "name": f"search: {board.title}",
         "methods": methods, "seeds": [leaderboard.seeds], "keep_models": False}
    )  # fmt: skip


def best_of(result: RetainResult, recipe: RetainRecipe) -> dict[str, LearnerOfStudy]:
    """Of every learner the combination with the highest accuracy at the end of the search's stream."""
    accuracy = {cell.label: cell.measure("accuracy") for cell in result.done}
    best: dict[str, tuple[float, LearnerOfStudy]] = {}
    for method in recipe.methods:
        reached = accuracy.get(method.title)
        if reached is not None and (method.name not in best or reached > best[method.name][0]):
            best[method.name] = (reached, method)
    return {name: method for name, (_, method) in best.items()}


def report_recipe(
    leaderboard: RetainLeaderboard, board: RetainBoard, best: Mapping[str, LearnerOfStudy], key: str
) -> RetainRecipe:
    """The learners as the search left them, on the stream that is reported."""
    methods = [
        {"name": name, "label": name, "settings": _settings(leaderboard, best[name]), "training": best[name].training}
        for name in dict.fromkeys(method.name for method in leaderboard.methods)
        if name in best and name not in board.skip
    ]  # fmt: skip
    return load_retain_recipe(
        {"kind": "retain", **board.recipe, "name": f"{leaderboard.name} {key}", "methods": methods,
         "seeds": leaderboard.seeds, "keep_models": False}
    )  # fmt: skip


def to_markdown(content: Mapping[str, Any]) -> str:
    """The results as a page."""
    lines = [
        f"# {content['title']}",
        "",
        f"Learners with a buffer keep {content['memory']} records; all see every record of a task equally "
        "often (joint goes over those of earlier tasks again, and what tunes or distils at the end of a task takes more "
        "time). Hyperparameters were searched on another stream "
        f"with a seed that is not reported. Means over {content['seeds']} seeds with 95 % intervals over seeds, in "
        "per cent; a learner that diverged with some seeds has the mean over the others, and says so. Seconds depend on "
        "what else the machine did.",
    ]
    for board in content["boards"].values():
        names = [name for name in SHOWN if any(name in row["measures"] for row in board["rows"])]
        lines += ["", f"## {board['title']}", "", f"{board['setting']}", ""]
        lines += [board["note"], ""] if board.get("note") else []
        lines += [f"| learner | {' | '.join(SHOWN[name] for name in names)} | found |"]
        lines += ["|---|" + "---:|" * len(names) + "---|"]
        for row in board["rows"]:
            figures = [shown(name, _mean(row["measures"].get(name))) for name in names]
            found = ", ".join(f"{key} {value}" for key, value in row["found"].items())
            count = row["measures"]["accuracy"][2]
            name = (
                row["learner"]
                if count == content["seeds"]
                else f"{row['learner']} ({count} of {content['seeds']} seeds)"
            )
            lines.append(f"| {name} | {' | '.join(figures)} | {found} |")
        lines += [f"\nNot run: {name}: {reason}." for name, reason in board["skipped"].items()]
        lines += [f"\nFailed: {problem}" for problem in board["failed"]]
    return "\n".join(lines) + "\n"


def _settings(leaderboard: RetainLeaderboard, method: LearnerOfStudy) -> dict[str, Any]:
    """Of a learner; what keeps records keeps as many as all."""
    fields = getattr(LEARNERS.get(method.name), "__dataclass_fields__", {})
    if "memory" in fields:
        return {"memory": leaderboard.memory, **method.settings}
    return dict(method.settings)


def _combinations(search: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]


def _entry(
    board: RetainBoard, wanted: Sequence[str], best: Mapping[str, LearnerOfStudy], result: RetainResult
) -> dict[str, Any]:
    rows = [
        {
            "learner": row.label,
            "measures": {name: list(mean) for name, mean in row.measures.items()},
            "found": {**best[row.label].training, **best[row.label].settings},
        }
        for row in sorted(result.summary(), key=lambda row: -row.measures["accuracy"][0])
    ]
    lost = [f"{name}: no combination of the search ended" for name in wanted if name not in best]
    return {
        "title": board.title,
        "note": board.note,
        "setting": _said(board.recipe) + "; searched with " + _said(board.tune),
        "rows": rows,
        "skipped": board.skip,
        "failed": result.failed + lost,
    }


def _said(tree: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in tree.items())


def _mean(values: Sequence[Any] | None) -> Any:
    return None if values is None else tuple(values)
