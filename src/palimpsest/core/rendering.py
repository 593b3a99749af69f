"""Renderers of reports by file suffix; the report package registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from palimpsest.core.registry import Registry

RENDERERS: Registry[Callable[..., str]] = Registry("report format", "palimpsest.report")
"""Functions from a list of audit reports to the text of a file, by suffix without the dot."""

renderer: Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]] = RENDERERS.register
