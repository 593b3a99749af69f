"""`palimpsest replicate`: run the claims of a published system again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.loading import read_seeds
from palimpsest.cli.options import AsJson
from palimpsest.cli.output import emit, say, show

EXAMPLE = "Examples:\n\npalimpsest replicate ssd\n\npalimpsest replicate ssd --seeds 5 --out runs/ssd"
DOES_NOT_HOLD = 1


def command(
    slug: Annotated[str, typer.Argument(help="Name of a recipe in replications/, such as ssd, or its file.")],
    seeds: Annotated[
        str, typer.Option(metavar="N|A,B,...", help="Number of seeds, or the seeds themselves.")
    ] = "3",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the studies; runs/replications/SLUG by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes of this machine; 0 works in this one.")] = 2,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of the result SLUG.json; 'results' beside the recipe by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the claims of a paper on a small scale: claim, the paper's figure, ours, whether it holds."""
    from palimpsest.study.replication import replicate

    result = replicate(slug, out=out, seeds=read_seeds(seeds), workers=workers, results=results)
    if as_json:
        emit(result.to_dict())
    else:
        show(result.table())
    say(f"results: {result.path}")
    if not result.passed:
        raise typer.Exit(DOES_NOT_HOLD)
