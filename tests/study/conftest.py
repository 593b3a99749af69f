"""Fixtures of the study tests: third-party methods, and a real PostgreSQL server."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.core.unlearner import UNLEARNERS

PREFIX = "study-test-"


@pytest.fixture
def plugins() -> Iterator[None]:
    """The methods of `plugins.py` in the registry, for the length of a test."""
    UNLEARNERS.load()
    from tests.study import plugins as module

    for value in vars(module).values():
        card = getattr(value, "card", None)
        if card is not None and card.name.startswith(PREFIX):
            UNLEARNERS.register(card.name)(value)
    yield
    for name in [name for name in UNLEARNERS.names() if name.startswith(PREFIX)]:
        del UNLEARNERS._entries[name]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, in a temporary folder, reached by its socket."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not binaries:
        pytest.skip("no PostgreSQL server on this machine (Debian: apt install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="palimpsest-pg-", dir="/tmp"))
    user = _owner(folder)
    try:
        _run(
            binaries[-1].parent / "initdb",
            "-D",
            folder / "data",
            "-A",
            "trust",
            "-U",
            "palimpsest",
            user=user,
        )
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        _run(
            binaries[-1], "-D", folder / "data", "-o", options, "-l", folder / "log", "-w", "start", user=user
        )
        try:
            yield f"postgresql://palimpsest@/postgres?host={folder}"
        finally:
            _run(binaries[-1], "-D", folder / "data", "-m", "immediate", "-w", "stop", user=user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner(folder: Path) -> str | None:
    """The account to run the server under: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, account.pw_uid, account.pw_gid)
        return name
    pytest.skip("PostgreSQL does not run as root, and there is no account 'postgres' or 'nobody'")


def _run(*command: object, user: str | None) -> None:
    subprocess.run([str(part) for part in command], user=user, check=True, capture_output=True, cwd="/")
