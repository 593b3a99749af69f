"""Running the command line: in this process, or as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from palimpsest.cli.main import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `palimpsest ...` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def start(tmp_path):
    """Starts `palimpsest ...` as a process of its own, in an empty folder."""

    def begin(*words: object, **environment: str) -> subprocess.Popen[str]:
        program = Path(sys.executable).with_name("palimpsest")
        return subprocess.Popen(
            [program, *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin
