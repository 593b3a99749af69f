"""Worker processes: independent jobs side by side, and none that outlives its parent."""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from palimpsest.core.errors import PalimpsestError

J = TypeVar("J")
R = TypeVar("R")
PR_SET_PDEATHSIG = 1


class WorkerFailed(PalimpsestError):
    """A worker process was killed, cannot start, or met an error of its own."""


def in_processes(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[R]:
    """What comes of every job, as soon as it is done, in no particular order.

    Args:
        work: Does one job. With workers it is sent to each of them once, so it must be picklable.
        jobs: Plain data.
        workers: Number of processes; 0 works in this one, in order.

    Raises:
        WorkerFailed: If a worker dies. Results that were yielded before stay good.
        Exception: Whatever `work` raises in a worker, raised here.
    """
    if workers == 0:
        yield from map(work, jobs)
        return
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise WorkerFailed('A script that uses workers must do so under: if __name__ == "__main__".')
    waiting, staff, sent = deque(jobs), dict[Connection, Any](), _by_value(work)
    threads = max(1, torch.get_num_threads() // workers)
    try:
        for _ in range(min(workers, len(waiting))):
            pipe, process = _hire(sent, threads)
            staff[pipe] = process
            pipe.send(waiting.popleft())
        while staff:
            for pipe in wait(list(staff)):
                assert isinstance(pipe, Connection)
                yield _heard(pipe, staff[pipe])
                if waiting:
                    pipe.send(waiting.popleft())
                else:
                    pipe.close()
                    staff.pop(pipe).join()
    finally:  # of an error, or because whoever reads the results gave up
        for process in staff.values():
            process.kill()
            process.join()


def die_with(parent: int) -> None:
    """Let this process end when its parent does, even by SIGKILL.

    Args:
        parent: Process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _by_value(work: Callable[[J], R]) -> bytes:
    """The work as bytes.

    Left to itself, multiprocessing has torch move tensors into shared memory, under the feet of every numpy
    array that looks at them (labels of records do).
    """
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as problem:
        raise WorkerFailed(
            f"Model, records or method cannot be sent to worker processes ({problem}). "
            "Define their classes in a module, or work without workers."
        ) from problem


def _hire(work: bytes, threads: int) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, os.getpid(), threads), name="palimpsest-job")
    process.start()
    theirs.close()  # so that the pipe ends when the worker does
    return pipe, process


def _heard(pipe: Connection, process: Any) -> Any:
    try:
        kind, said = pipe.recv()
    except (EOFError, OSError) as problem:
        process.join()
        raise WorkerFailed(
            f"A worker process ended without an answer (exit code {process.exitcode}): killed, out of memory, or "
            'started by a script without `if __name__ == "__main__"`. What was finished is kept.'
        ) from problem
    if kind == "error":
        raise said
    return said


def _serve(pipe: Connection, sent: bytes, parent: int, threads: int) -> None:
    die_with(parent)
    work: Callable[[Any], Any] = pickle.loads(sent)  # noqa: S301  # what the parent process made
    torch.set_num_threads(threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", work(job)))
        except Exception as problem:
            pipe.send(("error", _portable(problem)))


def _portable(problem: Exception) -> Exception:
    """The exception itself if it survives the way through a pipe, else its text."""
    try:
        copy.copy(problem)  # takes the same way: class and arguments
    except Exception:
        return WorkerFailed(f"{type(problem).__name__}: {problem}")
    if not isinstance(problem, PalimpsestError):
        problem.add_note(traceback.format_exc())
    return problem


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
