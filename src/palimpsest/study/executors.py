"""Executors: where the jobs of a plan run. One protocol, so that a cluster slots in beside the local one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

from palimpsest.study.plan import Job
from palimpsest.study.workshop import Done, work

PR_SET_PDEATHSIG = 1


class Executor(Protocol):
    """Runs jobs in any order and any place; a job is plain data, and so is what comes of it."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What came of each job, as soon as it is done. Jobs that raise come back as failed."""
        ...


class LocalExecutor:
    """Runs jobs in this process, or in worker processes of this machine.

    Every worker is a pool of its own, so that one that is killed takes only its job with it, and jobs that
    share passes (`Job.affinity`) are given to the worker that has them already.

    Args:
        workers: Number of processes; 0 runs in this one.
        do: What to do with a job; a module-level function.
    """

    def __init__(self, workers: int = 0, do: Callable[[Job], Done] = work):
        self.workers, self.do = workers, do

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What came of each job, as soon as it is done."""
        if self.workers == 0:
            yield from map(self.do, jobs)
            return
        waiting = deque(jobs)
        pools = [_pool() for _ in range(min(self.workers, max(len(jobs), 1)))]
        last = [""] * len(pools)
        running: dict[Future[Done], tuple[int, Job]] = {}
        try:
            while waiting or running:
                busy = {index for index, _ in running.values()}
                for index in range(len(pools)):
                    if waiting and index not in busy:
                        job = _next(waiting, last, index)
                        last[index] = job.affinity
                        running[pools[index].submit(self.do, job)] = (index, job)
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    index, job = running.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        pools[index] = _pool()
                        reason = "the worker process was killed (out of memory, perhaps)"
                        yield Done(job.key, "crashed", reason)
        finally:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)


def _next(waiting: deque[Job], last: list[str], index: int) -> Job:
    """The next job for a worker: of its own affinity, else of one that no worker has, else any."""
    others = {affinity for place, affinity in enumerate(last) if place != index}
    own = (job for job in waiting if job.affinity == last[index])
    free = (job for job in waiting if job.affinity not in others)
    job = next(own, None) or next(free, None) or waiting[0]
    waiting.remove(job)
    return job


def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_die_with_parent, initargs=(os.getpid(),))


def _die_with_parent(parent: int) -> None:
    """Let the system end this worker when the study's process dies, even by SIGKILL (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
