"""`palimpsest data`: data sets by name."""

from __future__ import annotations

from palimpsest.cli.listing import Listing, described
from palimpsest.cli.options import AsJson, Markdown

EXAMPLE = "Example: palimpsest data"


def command(markdown: Markdown = False, as_json: AsJson = False) -> None:
    """List the data sets that --data knows."""
    from palimpsest.data import DATASETS

    Listing(("name", "records", "settings"), described(DATASETS.items(), "records")).print(markdown, as_json)
