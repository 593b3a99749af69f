"""Studies that are killed at random moments, and a disk that is full: nothing is lost, nothing is half there."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from palimpsest.core.errors import CannotWrite
from palimpsest.parts.checkpoint import read_checkpoint
from palimpsest.study.compare import compare
from palimpsest.study.result import StudyResult
from tests.study.studies import figures, tiny

RECIPE = tiny(
    forget=["label=3", "fraction=0.1"],
    methods=["ssd", "finetune", "gradient-ascent"],
    seeds=2,
    training={"epochs": 6},
)
PROGRAM = """
import json, sys
from palimpsest.study.compare import compare
import palimpsest.audit.utility, palimpsest.forget.classifier.ssd
if __name__ == "__main__":
    print("ready", flush=True)
    result = compare(json.loads(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]), progress=False)
"""


def start(folder: Path, workers: int) -> subprocess.Popen[str]:
    """A study in a process of its own, about to begin."""
    script = folder.parent / "study.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script, json.dumps(RECIPE), folder, str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def kill_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the study was still at work when it was killed; its workers are shown to be gone."""
    time.sleep(seconds)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[StudyResult, float]:
    """The study without any kill, and the seconds that it took."""
    begin = time.monotonic()
    result = compare(RECIPE, tmp_path_factory.mktemp("undisturbed"), progress=False)
    return result, time.monotonic() - begin


def check_whole(folder: Path) -> None:
    """Every weights file under its final name can be read, whenever the study was killed."""
    for path in (folder / "artifacts").glob("*.safetensors"):
        read_checkpoint(path)


def disturb(folder: Path, workers: int, kills: int, seed: int, span: float) -> int:
    """Kill a study at random moments; the number of kills that hit it at work."""
    moments, hits = random.Random(seed), 0
    for _ in range(kills):
        hits += kill_after(start(folder, workers), moments.uniform(0.02, span))
        check_whole(folder)
    return hits


def test_a_study_killed_at_random_moments_ends_as_if_undisturbed(tmp_path, undisturbed):
    result, seconds = undisturbed
    hits = disturb(tmp_path / "run", workers=0, kills=4, seed=0, span=seconds / 2)
    assert hits >= 1
    assert figures(compare(RECIPE, tmp_path / "run", progress=False)) == figures(result)


def test_so_does_one_with_worker_processes_that_die_with_it(tmp_path, undisturbed):
    result, seconds = undisturbed
    hits = disturb(tmp_path / "run", workers=2, kills=2, seed=1, span=seconds / 2 + 4)
    assert hits >= 1
    assert figures(compare(RECIPE, tmp_path / "run", progress=False)) == figures(result)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("workers", [0, 2])
def test_many_more_kills_change_nothing(tmp_path, undisturbed, workers, seed):
    result, seconds = undisturbed
    hits = disturb(tmp_path / "run", workers, kills=10, seed=seed, span=seconds / 4 + 4 * bool(workers))
    assert hits >= 3
    assert figures(compare(RECIPE, tmp_path / "run", workers=workers, progress=False)) == figures(result)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_stops_the_study_with_a_clear_error_and_space_lets_it_go_on(
    tmp_path, small_disk, undisturbed, workers
):
    result, _ = undisturbed
    with pytest.raises(CannotWrite, match=r"[Ss]pace|full"):
        compare(RECIPE, small_disk / "run", workers=workers, progress=False)
    check_whole(small_disk / "run")
    leftovers = [path.name for path in (small_disk / "run").rglob(".*") if path.name != ".lock"]
    assert leftovers == []
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    assert figures(compare(RECIPE, small_disk / "run", progress=False)) == figures(result)


def test_a_disk_too_full_to_begin_is_found_before_any_work(small_disk):
    (small_disk / "ballast").write_bytes(b"x" * 396 * 1024)
    with pytest.raises(CannotWrite):
        compare(RECIPE, small_disk / "run", progress=False)
    assert list((small_disk / "run").glob("artifacts/*")) == []
