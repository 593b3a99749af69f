"""The command `palimpsest`: its verbs, and what errors and interrupts look like."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import palimpsest
from palimpsest.cli import (
    advise,
    audit,
    audits,
    benchmarks,
    compare,
    data,
    forget,
    leaderboard,
    methods,
    models,
    replicate,
    report,
    retain,
    tune,
    worst_case,
)
from palimpsest.cli.output import complain, say
from palimpsest.core.errors import PalimpsestError

BAD_INPUT, INTERRUPTED = 2, 130
RESUMABLE = ("compare", "tune", "worst-case", "replicate", "leaderboard", "retain")


class Verbs(TyperGroup):
    """Runs a verb; an error is one message and an exit code, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was named.

        PALIMPSEST_DEBUG=1 lets errors through with their traceback.
        """
        try:
            return super().invoke(ctx)
        except PalimpsestError as problem:
            if os.environ.get("PALIMPSEST_DEBUG"):
                raise
            complain(str(problem))
            raise typer.Exit(BAD_INPUT) from problem
        except KeyboardInterrupt as stop:
            resumable = ctx.invoked_subcommand in RESUMABLE
            say("Interrupted; resume with the same command." if resumable else "Interrupted.")
            raise typer.Exit(INTERRUPTED) from stop


app = typer.Typer(
    name="palimpsest",
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: palimpsest compare --data digits --forget label=3 --methods ssd,scrub --seeds 3 --out runs/first",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(palimpsest.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make trained models forget, and prove it.

    Exit codes: 0 done; 1 a replicated claim does not hold; 2 bad input; 3 every method of a study failed;
    130 interrupted. PALIMPSEST_DEBUG=1 shows tracebacks.
    """


VERBS = {
    module.__name__.rpartition(".")[2].replace("_", "-"): module
    for module in (
        compare, forget, audit, worst_case, retain, tune, report, methods, audits, benchmarks, advise, replicate,
        leaderboard, data, models,
    )
}  # fmt: skip
for name, verb in VERBS.items():
    app.command(name, epilog=verb.EXAMPLE)(verb.command)


def run() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    run()
