"""`palimpsest tune`: hyperparameters from a search on a validation request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palimpsest.cli.loading import import_modules, listed
from palimpsest.cli.options import RULE, AsJson, Change, Imports, Workers
from palimpsest.cli.output import emit, say, show

if TYPE_CHECKING:
    from palimpsest.core.search_space import Searchable

EXAMPLE = (
    "Examples:\n\n"
    "palimpsest tune --data digits --forget label=7 --methods ssd,scrub --trials 12 --out runs/tuned\n\n"
    "palimpsest compare --forget label=3 --methods ssd,scrub --tuned runs/tuned --out runs/first\n\n"
    "palimpsest tune recipe.yaml --search ssd.alpha=1..50:log --budget 0.2 --out runs/tuned"
)


def command(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe of a study; options below change it.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the search.")] = Path("runs/tuned"),
    data: Annotated[
        str | None, typer.Option(metavar="NAME[:PLACE]", help="Data set; digits if none is named.")
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE", help=f"The validation request, not the one to report. {RULE} Repeatable."
        ),
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B,...", help="Methods to tune.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds per trial.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Architecture; small_cnn if none is named.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of the training of the original.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Per method; the first is its defaults.")] = 12,
    gaps: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Distances to the retrained model to make small: forget, retain, test, membership, relearning, "
            "representation, likelihood; by default all that the task has.",
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Largest time of a method as a share of the retraining time.")
    ] = 1.0,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD.KEY=SPACE",
            help="Where to search, instead of what the method declares: 1..50:log, 1..8:int, adam,sgd. Repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    workers: Workers = None,
    change: Change = None,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Search hyperparameters on a validation request: what comes closest to retraining within the budget.

    The same command resumes a search that was interrupted. `palimpsest compare --tuned FOLDER` uses what was
    found, and refuses to report the request that it was found on.
    """
    if recipe is None and not forget:
        raise typer.BadParameter("name a validation request (--forget label=7), or a recipe")
    if recipe is None and not methods:
        raise typer.BadParameter("say which methods to tune (--methods ssd,scrub), or name a recipe")
    named = {
        "data": data,
        "model": model,
        "training.epochs": epochs,
        "forget": forget or None,
        "methods": listed(methods) or None,
        "seeds": seeds,
        "imports": imports or None,
    }
    import_modules(imports)
    spaces = _spaces(search or [])
    from palimpsest.study.tuned import TUNED
    from palimpsest.study.tuning import tune

    said = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    tuned = tune(
        recipe or {}, out, trials, listed(gaps) or None, budget, spaces, seed,
        [*said, *(change or [])], workers,
    )  # fmt: skip
    if as_json:
        emit({**tuned.model_dump(mode="json"), "file": out / TUNED})
        return
    show(tuned.table())
    say(f"tuned: {out / TUNED}")


def _spaces(said: list[str]) -> dict[str, dict[str, Searchable]]:
    """Spaces by method and hyperparameter from "method.key=space"."""
    from palimpsest.core.search_space import read_space

    found: dict[str, dict[str, Searchable]] = {}
    for text in said:
        place, equals, space = text.partition("=")
        method, dot, key = place.rpartition(".")
        if not (equals and dot and method and key):
            raise typer.BadParameter(
                f"--search is METHOD.KEY=SPACE, such as ssd.alpha=1..50:log, not '{text}'"
            )
        found.setdefault(method, {})[key] = read_space(space)
    return found
