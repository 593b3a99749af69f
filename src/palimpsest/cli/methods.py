"""`palimpsest methods`: what can make a model forget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from palimpsest.cli.listing import Listing, replace_between
from palimpsest.cli.loading import import_modules
from palimpsest.cli.options import AsJson, Imports, Markdown
from palimpsest.cli.output import say

EXAMPLE = (
    "Examples:\n\npalimpsest methods\n\npalimpsest methods --json\n\npalimpsest methods --into README.md"
)
MARK = "methods"


def command(
    markdown: Markdown = False,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Replace the table between the marks of a Markdown file."),
    ] = None,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """List the methods: name, paper, domains, needs."""
    import_modules(imports)
    listing = method_listing()
    if into is not None:
        replace_between(into, MARK, listing.markdown())
        say(f"wrote the table of methods into {into}")
    else:
        listing.print(markdown, as_json)


def method_listing() -> Listing:
    """All registered methods."""
    from palimpsest.core.needs import Need
    from palimpsest.core.unlearner import UNLEARNERS

    rows: list[dict[str, Any]] = []
    for name, cls in UNLEARNERS.items():
        card = cls.card
        paper = card.paper
        rows.append(
            {
                "name": name,
                "summary": card.summary,
                "paper": f"{paper.title} ({paper.venue})" if paper else "",
                "link": paper.link if paper else None,
                "domains": list(card.tasks),
                "needs": [need.value for need in Need if need in card.needs],
            }
        )
    return Listing(("name", "paper", "domains", "needs"), rows)
