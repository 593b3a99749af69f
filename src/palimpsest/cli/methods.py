"""`palimpsest methods`: what can make a model forget, and what learns on without forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from palimpsest.cli.listing import Listing, described, replace_between
from palimpsest.cli.loading import import_modules
from palimpsest.cli.options import AsJson, Imports, Markdown
from palimpsest.cli.output import say

EXAMPLE = (
    "Examples:\n\npalimpsest methods\n\npalimpsest methods --json\n\npalimpsest methods --into README.md\n\n"
    "palimpsest methods --learners --json"
)
MARK = "methods"


def command(
    markdown: Markdown = False,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Replace the table between the marks of a Markdown file."),
    ] = None,
    learners: Annotated[bool, typer.Option("--learners", help="The learners of streams alone.")] = False,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """List the methods: name, paper, domains, needs; then the learners of streams: what they keep.

    As JSON the methods alone, or with --learners the learners alone.
    """
    import_modules(imports)
    if into is not None:
        replace_between(into, MARK, both_tables())
        say(f"wrote the tables of methods and learners into {into}")
    elif markdown and not learners:
        print(both_tables())
    else:
        if not learners:
            method_listing().print(markdown, as_json)
        if learners or not as_json:
            learner_listing().print(markdown, as_json)


def both_tables() -> str:
    """Methods, then learners, in Markdown."""
    between = "Learners of streams, for `palimpsest retain`:"
    return f"{method_listing().markdown()}\n\n{between}\n\n{learner_listing().markdown()}"


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


def learner_listing() -> Listing:
    """All registered learners of streams."""
    from palimpsest.retain.learner import LEARNERS, Keeps

    rows: list[dict[str, Any]] = []
    for (_, cls), about in zip(LEARNERS.items(), described(LEARNERS.items(), "summary"), strict=True):
        card, paper = cls.card, cls.card.paper
        rows.append(
            {
                **about,
                "paper": f"{paper.title} ({paper.venue})" if paper else "",
                "link": paper.link if paper else None,
                "streams": list(card.scenarios),
                "keeps": [kept.value for kept in Keeps if kept in card.keeps],
            }
        )
    return Listing(("name", "paper", "streams", "keeps"), rows)
