"""`palimpsest audits`: what can be asked of a model."""

from __future__ import annotations

from typing import Any

from palimpsest.cli.listing import Listing
from palimpsest.cli.loading import import_modules
from palimpsest.cli.options import AsJson, Imports, Markdown

EXAMPLE = "Examples:\n\npalimpsest audits\n\npalimpsest audits --markdown"


def command(
    markdown: Markdown = False,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """List the audits: name, number in the audit checklist, cost, whether it runs by default."""
    import_modules(imports)
    audit_listing().print(markdown, as_json)


def audit_listing() -> Listing:
    """All registered audits, in the order of the checklist."""
    from palimpsest.core.auditing import AUDITS

    rows: list[dict[str, Any]] = []
    for name, cls in sorted(AUDITS.items(), key=lambda item: (item[1].card.code, item[0])):
        card = cls.card
        rows.append(
            {
                "name": name,
                "code": card.code,
                "asks": card.summary,
                "cost": card.cost.value,
                "default": "yes" if card.default else "when named",
                "parts": list(card.parts),
                "domains": list(card.tasks),
            }
        )
    return Listing(("name", "code", "asks", "cost", "default"), rows)
