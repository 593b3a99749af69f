"""What the report package draws, found by name: reports by file suffix, charts of single results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from palimpsest.core.registry import Registry

RENDERERS: Registry[Callable[..., str]] = Registry("report format", "palimpsest.report")
"""Functions from a list of audit reports to the text of a file, by suffix without the dot."""

renderer: Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]] = RENDERERS.register

CHARTS: Registry[Callable[..., Any]] = Registry("chart", "palimpsest.report")
"""Functions from something measured to its Altair chart, by name; the report package registers them."""

chart: Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]] = CHARTS.register
