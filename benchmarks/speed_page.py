"""Timing, tables, and the page that measured tables are written into; no benchmark by itself."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "results" / "speed.md"


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Least processor time of one thread over some repeats: what other programs on the machine do counts little."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, in columns that can be read as they are."""
    lines = [list(headings), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    ruler = ["-" * width for width in widths]
    padded = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in [lines[0], ruler, *lines[1:]]
    ]
    return "\n".join(f"| {line} |" for line in padded)


def write_section(name: str, text: str, threads: str = "one thread") -> Path:
    """Replace what stands between the marks of a section by a measured table and what it was measured with.

    Args:
        name: Of the section.
        text: The table, and what it is about.
        threads: That it was measured with.

    Raises:
        ValueError: If the page has no such marks.
    """
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    page = PAGE.read_text(encoding="utf-8")
    if begin not in page or end not in page:
        raise ValueError(f"{PAGE} has no lines '{begin}' and '{end}'.")
    with_what = f"torch {torch.__version__}, {platform.system()} {platform.machine()}, {threads}."
    filled = f"{begin}\n\n{text}\n\nMeasured with {with_what}\n\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: filled, page), encoding="utf-8")
    return PAGE
