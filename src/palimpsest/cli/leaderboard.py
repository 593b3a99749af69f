"""`palimpsest leaderboard`: tune and compare all methods on several boards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.loading import listed
from palimpsest.cli.options import AsJson
from palimpsest.cli.output import emit, say

EXAMPLE = "Example: palimpsest leaderboard leaderboards/classifier.yaml --boards digits-class"


def command(
    file: Annotated[Path, typer.Argument(help="YAML file of the leaderboard.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the studies; runs/leaderboards/NAME by default."),
    ] = None,
    results: Annotated[Path, typer.Option(metavar="FOLDER", help="Where NAME.json and NAME.md go.")] = Path(
        "docs/results"
    ),
    boards: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Boards to run; by default all.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes of this machine; 0 works in this one.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Run a leaderboard: hyperparameters from a validation request or stream, figures from others, cost.

    The same command resumes one that was interrupted.
    """
    from palimpsest.study.leaderboard import load_leaderboard, run_leaderboard
    from palimpsest.study.retain.leaderboard import (
        is_retain_leaderboard,
        load_retain_leaderboard,
        run_retain_leaderboard,
    )

    wanted = listed(boards) or None
    if is_retain_leaderboard(file):
        learners = load_retain_leaderboard(file)
        place = out or Path("runs", "leaderboards", learners.name)
        path = run_retain_leaderboard(learners, place, results, wanted, workers)
    else:
        leaderboard = load_leaderboard(file)
        place = out or Path("runs", "leaderboards", leaderboard.name)
        path = run_leaderboard(leaderboard, place, results, wanted, workers)
    if as_json:
        emit(json.loads(path.read_text(encoding="utf-8")))
    say(f"results: {path}, {path.with_suffix('.md')}")
