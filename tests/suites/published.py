"""Published files, where the environment variable PALIMPSEST_DATA names a folder that holds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def published(*parts: str) -> Path:
    """A file or folder of the published data; skips, saying so, where it is absent."""
    folder = os.environ.get("PALIMPSEST_DATA")
    if not folder:
        pytest.skip("PALIMPSEST_DATA names no folder with published files")
    path = Path(folder).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not in the folder that PALIMPSEST_DATA names")
    return path
