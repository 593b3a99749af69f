"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from palimpsest.core.errors import CannotWrite


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file through a temporary neighbour, so that no reader ever sees half of it.

    Raises:
        CannotWrite: For lack of permission or space; an older file stays as it was.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101
        os.replace(temporary, path)  # noqa: PTH105
    except OSError as problem:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise CannotWrite(f"Cannot write {path}: {problem.strerror or problem}.") from problem
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` for text in UTF-8."""
    return write_bytes(path, text.encode())


def check_writable(folder: str | Path) -> Path:
    """Make a folder and check that files can be written in it.

    Raises:
        CannotWrite: If not, before any work is done.
    """
    folder = Path(folder)
    write_bytes(folder / ".writable", b"")
    (folder / ".writable").unlink(missing_ok=True)
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
