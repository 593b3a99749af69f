"""`palimpsest models`: architectures by name."""

from __future__ import annotations

from palimpsest.cli.listing import Listing, described
from palimpsest.cli.options import AsJson, Markdown

EXAMPLE = "Example: palimpsest models"


def command(markdown: Markdown = False, as_json: AsJson = False) -> None:
    """List our own architectures; torchvision:NAME, timm:NAME and package.module:factory work besides."""
    from palimpsest.models import MODELS

    rows = described(MODELS.items(), "network", hidden=("input_shape", "classes"))
    Listing(("name", "network", "settings"), rows).print(markdown, as_json)
