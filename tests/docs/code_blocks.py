"""Code blocks of Markdown pages."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(page: Path, language: str, title: str = "") -> list[str]:
    """Blocks of a language, with the title if one is named."""
    fence = re.compile(
        rf'^```{language}(?: title="(?P<title>[^"]*)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL
    )
    found = fence.finditer(page.read_text(encoding="utf-8"))
    return [match["code"] for match in found if not title or match["title"] == title]
