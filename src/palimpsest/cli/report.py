"""`palimpsest report`: the HTML report of a run, from its store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.loading import import_modules
from palimpsest.cli.options import AsJson, Imports
from palimpsest.cli.output import emit, say, show
from palimpsest.core.errors import InvalidRecipe

EXAMPLE = "Example: palimpsest report runs/first --out first.html"


def command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run of `palimpsest compare` or `palimpsest retain`."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; report.html in the folder by default.")
    ] = None,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Write the report of a study again, as far as the study has come."""
    import_modules(imports)
    from palimpsest.study.compare import open_run
    from palimpsest.study.retain.verb import is_retain_run

    if is_retain_run(run):
        _retain(run, out, as_json)
        return
    result = open_run(run)
    if not result.reports:
        raise InvalidRecipe(f"{run} holds no finished cell yet: run `palimpsest compare` to its end.")
    from palimpsest.report import write_report

    page = out or result.folder / "report.html"
    write_report(result.reports, page, result.name, result.failed)
    if as_json:
        emit({**result.to_dict(), "report": page})
    else:
        show(result.table())
        say(f"report: {page}")


def _retain(run: Path, out: Path | None, as_json: bool) -> None:
    """The report of a study of continual learning."""
    from palimpsest.report.retaining import write_retain_report
    from palimpsest.study.retain import open_retain

    result = open_retain(run)
    if not result.done:
        raise InvalidRecipe(f"{run} holds no finished cell yet: run `palimpsest retain` to its end.")
    page = write_retain_report(result, out or result.folder / "report.html")
    if as_json:
        emit({**result.to_dict(), "report": page})
    else:
        show(result.table())
        say(f"report: {page}")
