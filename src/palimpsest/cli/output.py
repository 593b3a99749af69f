"""Where words go: results to standard output, everything for humans beside them to standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, cast

WIDE = 200
"""Columns of a table that is piped into a file."""


def say(text: str) -> None:
    """Tell the human something that is no result."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)


def complain(text: str) -> None:
    """An error, in red."""
    from rich.console import Console
    from rich.text import Text

    message = Text.assemble(("Error: ", "bold red"), (text, "red"))
    Console(stderr=True, soft_wrap=True).print(message)


def show(*renderables: Any) -> None:
    """Print tables and panels on standard output, wide where no terminal limits them."""
    from rich.console import Console

    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if limited else WIDE, highlight=False)
    for item in renderables:
        console.print(item)


def emit(data: Any) -> None:
    """Print plain data as JSON on standard output; NaN and infinities become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=1, default=str, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in cast(list[Any], value)]
    return value
