from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from palimpsest.study.executors import LocalExecutor, WorkersCannotStart
from palimpsest.study.plan import Job
from tests.study.plugins import obeying, stillborn


def job(title: str, affinity: str = "") -> Job:
    return Job("cell", f"key of {title} {affinity}", {}, "", (), 0, {}, affinity=affinity, title=title)


@pytest.fixture(scope="module")
def two() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(2, obeying)
    yield executor
    executor.close()


@pytest.fixture
def places(two, tmp_path) -> set[str]:
    """Both workers, shown to be alive."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    return {done.reason for done in two.run([job(f"meet {meeting}", "one"), job(f"meet {meeting}", "two")])}


def test_without_workers_jobs_run_here_in_order():
    done = list(LocalExecutor(0, obeying).run([job("a"), job("b")]))
    assert [item.key for item in done] == ["key of a ", "key of b "]
    assert {item.reason for item in done} == {str(os.getpid())}


def test_workers_run_every_job_once_elsewhere_and_live_on(two, places):
    assert len(places) == 2
    assert str(os.getpid()) not in places
    again = list(two.run([job("a"), job("b", "other"), job("c")]))
    assert len({item.key for item in again}) == len(again) == 3
    assert {item.reason for item in again} <= places


def test_jobs_that_share_passes_go_to_the_same_worker(two, places):
    jobs = [job(f"sleep 0.{n}", affinity) for affinity in ("x", "y") for n in (11, 12, 13)]
    used: dict[str, set[str]] = {"x": set(), "y": set()}
    for item in two.run(jobs):
        used[item.key[-1]].add(item.reason)
    assert len(used["x"]) == len(used["y"]) == 1
    assert used["x"] != used["y"]


def test_a_killed_worker_takes_only_its_job_and_that_is_tried_once_more(two, tmp_path):
    jobs = [job("a"), job("die"), job("b"), job(f"die once {tmp_path / 'died'}"), job("c")]
    done = {item.key: item for item in two.run(jobs)}
    assert len(done) == 5
    failed = [key for key, item in done.items() if item.status != "done"]
    assert failed == ["key of die "]
    assert done[failed[0]].status == "crashed"
    assert "killed" in done[failed[0]].reason


def test_whoever_stops_reading_stops_the_workers(two, places):
    results = two.run([job("a"), job("sleep 60"), job("sleep 61")])
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 30
    assert not any(psutil.pid_exists(int(place)) for place in places)


def test_workers_that_cannot_start_are_an_error_not_a_wait():
    executor = LocalExecutor(1, stillborn)
    with pytest.raises(WorkersCannotStart, match="__main__"):
        list(executor.run([job("a"), job("b")]))


ORPHANS = """
from tests.study.test_executors import job
from tests.study.plugins import obeying
from palimpsest.study.executors import LocalExecutor
if __name__ == "__main__":
    for done in LocalExecutor(2, obeying).run([job("a"), job("b", "b"), job("sleep 60"), job("sleep 61", "b")]):
        print(done.reason, flush=True)
"""


def test_workers_die_when_the_studys_process_is_killed(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    assert all(worker.is_running() for worker in workers)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_alive(worker) for worker in workers):
        time.sleep(0.05)
    assert not any(_alive(worker) for worker in workers)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


UNGUARDED = """
from palimpsest.study.compare import compare
from tests.study.studies import tiny
compare(tiny(), {folder!r}, workers=1, progress=False)
"""


def test_a_script_without_a_main_guard_is_told_so_and_does_not_hang(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(UNGUARDED.format(folder=str(tmp_path / "run")))
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert 'if __name__ == "__main__"' in run.stderr.splitlines()[-1]
