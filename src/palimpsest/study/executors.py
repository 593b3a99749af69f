"""Executors: where the jobs of a plan run. One protocol, so that a cluster slots in beside the local one."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Protocol

from palimpsest.core.errors import PalimpsestError
from palimpsest.parts.processes import die_with
from palimpsest.study.plan import Job
from palimpsest.study.workshop import Done, Worker

TRIES = 2
"""A job whose worker was killed is tried once more: what was killed for memory may fit later."""
READY = "ready"


class Executor(Protocol):
    """Runs jobs in any order and any place; a job is plain data, and so is what comes of it."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What came of each job, as soon as it is done. Jobs that raise come back as failed."""
        ...

    def close(self) -> None:
        """Give back processes and memory; what still runs is stopped."""
        ...


class WorkersCannotStart(PalimpsestError):
    """Worker processes die before they take a job."""


class LocalExecutor:
    """Runs jobs in this process, or in worker processes of this machine.

    A worker that is killed takes only its job with it. Jobs that share passes (`Job.affinity`) are given
    to the worker that has them already. Workers live until `close`, and never longer than this process.

    Args:
        workers: Number of processes; 0 runs in this one.
        make: Makes what does the jobs, in the process that does them; must be importable by name.
    """

    def __init__(self, workers: int = 0, make: Callable[[], Callable[[Job], Done]] = Worker):
        self.workers, self.make = workers, make
        self._here: Callable[[Job], Done] | None = None
        self._staff: list[_Process] = []
        self._stillborn = 0

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What came of each job, as soon as it is done.

        Raises:
            WorkersCannotStart: If worker processes die before they take a job.
        """
        if self.workers == 0:
            self._here = self._here or self.make()
            yield from map(self._here, jobs)
            return
        waiting, tries = deque(jobs), Counter[str]()
        try:
            while waiting or self._busy():
                self._hand_out(waiting)
                for pipe in wait([process.pipe for process in self._staff]):
                    speaker = next(process for process in self._staff if process.pipe is pipe)
                    done = self._hear(speaker, waiting, tries)
                    if done is not None:
                        yield done
        finally:
            if self._busy():  # whoever reads the results gave up
                self.close()

    def close(self) -> None:
        """End all workers, at once if they are at work."""
        for process in self._staff:
            process.end()
        self._staff, self._here = [], None

    def _busy(self) -> bool:
        return any(process.job is not None for process in self._staff)

    def _hand_out(self, waiting: deque[Job]) -> None:
        """Hire as many workers as there is work for, and give every idle one a job."""
        wanted = min(self.workers, len(waiting) + sum(process.job is not None for process in self._staff))
        while len(self._staff) < wanted:
            self._staff.append(_Process(self.make))
        for process in self._staff:
            if waiting and process.ready and process.job is None:
                others = {other.affinity for other in self._staff if other is not process}
                process.take(_next(waiting, process.affinity, others))

    def _hear(self, process: _Process, waiting: deque[Job], tries: Counter[str]) -> Done | None:
        """What a worker says: that it is ready, what came of its job, or nothing, being dead."""
        try:
            said = process.pipe.recv()
        except (EOFError, OSError):
            return self._bury(process, waiting, tries)
        if said == READY:
            process.ready, self._stillborn = True, 0
            return None
        process.job = None
        return said

    def _bury(self, process: _Process, waiting: deque[Job], tries: Counter[str]) -> Done | None:
        self._staff.remove(process)
        process.end()
        job = process.job
        if job is None:
            self._stillborn += not process.ready
            if self._stillborn > self.workers:
                raise WorkersCannotStart(
                    "Worker processes die as they start (their messages are above). A script that calls compare "
                    'with workers must do so under: if __name__ == "__main__".'
                )
            return None
        tries[job.key] += 1
        if tries[job.key] < TRIES:
            waiting.appendleft(job)
            return None
        code = process.process.exitcode
        return Done(
            job.key, "crashed", f"its worker process was killed twice (exit code {code}); out of memory?"
        )


class _Process:
    """A worker process and the pipe to it."""

    def __init__(self, make: Callable[[], Callable[[Job], Done]]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, make, os.getpid()), name="palimpsest-worker"
        )
        self.process.start()
        theirs.close()  # so that the pipe ends when the worker does
        self.ready, self.affinity = False, ""
        self.job: Job | None = None

    def take(self, job: Job) -> None:
        """Start on a job; if the worker is dead, its pipe says so at the next reading."""
        self.job, self.affinity = job, job.affinity
        try:
            self.pipe.send(job)
        except OSError:
            return

    def end(self) -> None:
        """Let an idle worker go, stop a busy one."""
        if self.job is not None or not self.ready:
            self.process.kill()
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _next(waiting: deque[Job], affinity: str, others: set[str]) -> Job:
    """The next job for a worker: of its own affinity, else of one that no other worker has, else any."""
    own = (job for job in waiting if job.affinity == affinity)
    free = (job for job in waiting if job.affinity not in others)
    job = next(own, None) or next(free, None) or waiting[0]
    waiting.remove(job)
    return job


def _serve(pipe: Connection, make: Callable[[], Callable[[Job], Done]], parent: int) -> None:
    """A worker's life: jobs in, results out, until the pipe ends."""
    die_with(parent)
    do = make()
    pipe.send(READY)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(do(job))
