"""`palimpsest advise`: which methods can run with what is left."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, cast

import typer

from palimpsest.cli.loading import import_modules, listed
from palimpsest.cli.options import AsJson, Imports
from palimpsest.cli.output import emit, show
from palimpsest.core.errors import PalimpsestError
from palimpsest.core.needs import Need, parse_needs

EXAMPLE = "Example: palimpsest advise --have model,forget-data"
COLOURS = {"yes": "bold green", "with a setting": "yellow", "no": "red"}


def command(
    have: Annotated[
        str,
        typer.Option(
            metavar="A,B,...", help=f"What you still have: {', '.join(need.value for need in Need)}."
        ),
    ],
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Say which methods can run with what you have, and what the others lack.

    Some methods take a setting for what is missing, such as importances measured at training time for the
    retained data: they can run with that setting.
    """
    at_hand = parse_needs(listed(have))
    import_modules(imports)
    rows = _advice(at_hand)
    if as_json:
        emit({"have": sorted(need.value for need in at_hand), "methods": rows})
    else:
        _print(rows)


def _advice(have: frozenset[Need]) -> list[dict[str, Any]]:
    """Every method with what it lacks, those that can run first."""
    from palimpsest.core.unlearner import UNLEARNERS

    rows: list[dict[str, Any]] = []
    for name, cls in UNLEARNERS.items():
        lacks = cls.card.needs - have
        settings = {key: met for key, met in substitutes(cls).items() if met & lacks}
        rest = lacks.difference(*settings.values())
        rows.append(
            {
                "name": name,
                "summary": cls.card.summary,
                "can_run": "yes" if not lacks else "no" if rest else "with a setting",
                "settings": sorted(settings),
                "missing": [
                    {"need": need.value, "remedy": _remedy(need, settings)} for need in Need if need in lacks
                ],
            }
        )
    return sorted(
        rows, key=lambda row: (list(COLOURS).index(row["can_run"]), len(row["missing"]), row["name"])
    )


def substitutes(cls: type[Any]) -> dict[str, frozenset[Need]]:
    """Settings of a method that stand for needs, once they are given."""
    found: dict[str, frozenset[Need]] = {}
    for item in fields(cls) if hasattr(cls, "supplies") else ():
        if item.default is not None:
            continue
        try:
            supplied = cast(frozenset[Need], cls(**{item.name: "given"}).supplies)
        except PalimpsestError:
            continue  # the setting is something else: the method refuses the placeholder
        if supplied:
            found[item.name] = supplied
    return found


def _remedy(need: Need, settings: dict[str, frozenset[Need]]) -> str:
    """What to do: the setting that stands for the need, if there is one, else the general advice."""
    named = [key for key, met in settings.items() if need in met]
    return f"set {' or '.join(named)}, or {need.remedy}" if named else need.remedy


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for heading in ("method", "can run", "lacks", "what to do"):
        table.add_column(heading, no_wrap=heading in ("method", "can run"))
    for row in rows:
        lacks = ", ".join(item["need"] for item in row["missing"])
        remedies = "\n".join(item["remedy"] for item in row["missing"])
        word = Text(row["can_run"], COLOURS[row["can_run"]])
        table.add_row(Text(row["name"], "bold"), word, Text(lacks), Text(remedies or row["summary"]))
    show(table)
