"""What a study's results depend on beside its recipe: the bytes of the data, the code of plug-ins."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import palimpsest
from palimpsest.parts.fingerprint import records_fingerprint

OWN = palimpsest.__name__
data_fingerprint = records_fingerprint


def code_fingerprint(entry: Any) -> str:
    """The release of Palimpsest, or for code from elsewhere a hash of its source file."""
    module = str(getattr(entry, "__module__", ""))
    if module.partition(".")[0] == OWN:
        return palimpsest.__version__
    source = _source_of(entry)
    return hashlib.sha256(source).hexdigest()[:20] if source else module


def foreign_modules(entries: Iterable[Any]) -> tuple[str, ...]:
    """Modules that another process must import to know the entries.

    Those that are neither ours nor the main program, which spawned processes run by themselves.
    """
    names: Sequence[str] = sorted({str(getattr(entry, "__module__", "")) for entry in entries})
    return tuple(name for name in names if name.partition(".")[0] not in (OWN, "__main__", ""))


def _source_of(entry: Any) -> bytes:
    try:
        file = inspect.getsourcefile(entry)
    except (TypeError, OSError):
        file = None
    if file is None:
        file = getattr(sys.modules.get(getattr(entry, "__module__", "")), "__file__", None)
    return Path(file).read_bytes() if file and Path(file).is_file() else b""
