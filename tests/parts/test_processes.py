"""Worker processes: the same results as without them, errors that come through, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from palimpsest.core.errors import InvalidAudit, UnknownName
from palimpsest.parts.processes import WorkerFailed, _portable, in_processes


def picky(number: int) -> int:
    if number == 2:
        raise InvalidAudit("two is refused")
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def slow(number: int) -> int:
    time.sleep(60)
    return number


@dataclass(frozen=True)
class Square:
    """Work with a tensor that a numpy array looks at, as the labels of records do."""

    powers: torch.Tensor

    def __call__(self, number: int) -> tuple[int, int]:
        return number ** int(self.powers[-1]), os.getpid()


def test_workers_do_every_job_once_and_elsewhere_and_leave_the_data_alone():
    powers = torch.full((100_000,), 2)
    view = powers.numpy()
    found = list(in_processes(Square(powers), range(7), 2))
    assert (view == 2).all() and view.ctypes.data == powers.data_ptr() and not powers.is_shared()
    assert sorted(value for value, _ in found) == [0, 1, 4, 9, 16, 25, 36]
    assert os.getpid() not in {process for _, process in found}
    assert [value for value, _ in in_processes(Square(powers), range(3), 0)] == [0, 1, 4]
    assert list(in_processes(picky, [], 2)) == []


@pytest.mark.parametrize(
    ("job", "error", "words"),
    [
        pytest.param(2, InvalidAudit, "two is refused", marks=pytest.mark.slow),
        (4, WorkerFailed, "exit code -9"),
    ],
)
def test_errors_come_through_and_a_killed_worker_is_named(job: int, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        list(in_processes(picky, [job], 1))


def test_what_cannot_be_sent_is_said_and_without_workers_it_works():
    def local(number: int) -> int:
        return number

    with pytest.raises(WorkerFailed, match="cannot be sent to worker processes"):
        list(in_processes(local, [1], 1))
    assert list(in_processes(local, [1], 0)) == [1]


def test_an_error_that_cannot_be_sent_comes_as_its_words():
    problem = UnknownName("number", "three", ["two", "four"])
    sent = _portable(problem)
    assert isinstance(sent, WorkerFailed) and "Unknown number 'three'" in str(sent)
    assert _portable(InvalidAudit("no")).args == ("no",)


@pytest.mark.slow
def test_giving_up_ends_the_workers():
    before = set(psutil.Process().children(recursive=True))
    results = in_processes(picky, [1, *[5] * 50], 2)
    next(results)
    results.close()
    left = {
        process
        for process in psutil.Process().children(recursive=True)
        if "spawn_main" in str(process.cmdline())
    }
    assert not left - before


@pytest.mark.slow
def test_workers_die_with_their_parent_even_if_it_is_killed():
    code = (
        "from tests.parts.test_processes import slow\nfrom palimpsest.parts.processes import in_processes\n"
    )
    code += "list(in_processes(slow, [1, 2], 2))\n"
    folder = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=folder)
    try:
        watched = psutil.Process(parent.pid)
        deadline = time.monotonic() + 60
        children: list[psutil.Process] = []
        while len(children) < 2 and time.monotonic() < deadline:
            children = [c for c in watched.children() if "spawn_main" in " ".join(c.cmdline())]
            time.sleep(0.2)
        assert len(children) == 2
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [child for child in children if _alive(child)]


def _alive(process: psutil.Process) -> bool:
    """Not so if it is only a name that nobody has taken off the list."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
