"""`palimpsest benchmarks`: what `compare --bench` can fill in."""

from __future__ import annotations

from palimpsest.cli.listing import Listing
from palimpsest.cli.options import AsJson, Markdown

EXAMPLE = "Example: palimpsest benchmarks"


def command(markdown: Markdown = False, as_json: AsJson = False) -> None:
    """List benchmarks, published and generated, for `palimpsest compare --bench`."""
    from palimpsest.suites.benchmark import BENCHMARKS

    rows = [{"name": name, "benchmark": found.summary} for name, found in BENCHMARKS.items()]
    Listing(("name", "benchmark"), rows).print(markdown, as_json)
