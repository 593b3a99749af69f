"""Running a plan: originals, controls and cells that have no result yet, each stored when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from rich.progress import Progress

from palimpsest.core.errors import CannotWrite
from palimpsest.study.control import is_sound, place_of
from palimpsest.study.executors import Executor
from palimpsest.study.plan import Job, Plan
from palimpsest.study.store import Store
from palimpsest.study.tables import ArtifactRow, CellRow, FindingRow, SeriesRow, now
from palimpsest.study.workshop import Done


class Run:
    """The three waves of a study.

    Args:
        plan: What there is to do.
        store: Where results are.
        executor: Where jobs run.
        bar: To show how far it is.
        again: Statuses of cells that are run once more.
    """

    def __init__(self, plan: Plan, store: Store, executor: Executor, bar: Progress, again: Iterable[str]):
        self.plan, self.store, self.executor, self.bar = plan, store, executor, bar
        self.again = set(again)
        self.lost: dict[str, Done] = {}

    def all(self) -> None:
        """Run every job that has no result yet.

        Raises:
            CannotWrite: If results cannot be written; what was written before stays.
        """
        status = self.store.statuses(job.key for job in self.plan.cells)
        cells = self._with_what_they_follow(
            [job for job in self.plan.cells if status.get(job.key, "waiting") in {"waiting", *self.again}]
        )
        needed = {key for job in cells for key in job.needs}
        originals, controls = (
            self._untrained([job for job in wave if job.key in needed])
            for wave in (self.plan.originals, self.plan.controls)
        )
        before = len(self.plan.cells) - len(cells)
        total = len(originals) + len(controls) + len(self.plan.cells)
        self.task = self.bar.add_task("starting", total=total, completed=before)
        self._train(originals, "training originals")
        self._train(controls, "retraining controls")
        self._run_cells(cells)
        self.bar.update(self.task, description="done")

    def _untrained(self, jobs: Sequence[Job]) -> list[Job]:
        """Jobs whose weights are absent or not the bytes that were written."""
        known = self.store.artifacts(job.key for job in jobs)
        return [
            job
            for job in jobs
            if job.key not in known or not is_sound(job.place, job.key, known[job.key].sha256)
        ]

    def _train(self, jobs: Sequence[Job], title: str) -> None:
        by_key = {job.key: job for job in jobs}
        for done in self._results(jobs, title):
            if done.status == "done":
                self.store.put_artifact(_artifact(by_key[done.key], done))
            else:
                self.lost[done.key] = done

    def _run_cells(self, cells: Sequence[Job]) -> None:
        steps: dict[int, list[Job]] = {}
        for job in cells:
            steps.setdefault(job.step, []).append(job)
        for step in sorted(steps):
            self._run_step(steps[step])

    def _run_step(self, cells: Sequence[Job]) -> None:
        by_key = {job.key: job for job in cells}
        self._note_missing(cells)
        ready = [job for job in cells if not self.lost.keys() & {*job.needs, job.start}]
        for done in self._results(self._informed(ready), "forgetting and auditing"):
            self._put(by_key[done.key], done)
            del by_key[done.key]
        for job in by_key.values():
            key = next(key for key in (*job.needs, job.start) if key in self.lost)
            cause = self.lost[key]
            said = (
                "the request before could not be met"
                if key == job.start
                else "its models could not be trained"
            )
            reason = cause.reason if cause.reason.startswith(said) else f"{said}: {cause.reason}"
            self._put(job, replace(cause, key=job.key, reason=reason))
            self.bar.advance(self.task)

    def _with_what_they_follow(self, cells: Sequence[Job]) -> list[Job]:
        """The cells, and those that left a model which one of them starts from and which is not there any more."""
        by_key = {job.key: job for job in self.plan.cells}
        wanted = {job.key for job in cells}
        known = self.store.artifacts(job.start for job in self.plan.cells if job.start)
        for job in sorted(self.plan.cells, key=lambda job: -job.step):
            if job.key not in wanted or job.start not in known or job.start in wanted:
                continue
            if not is_sound(by_key[job.start].place, job.start, known[job.start].sha256):
                wanted.add(job.start)
        return [job for job in self.plan.cells if job.key in wanted]

    def _note_missing(self, cells: Sequence[Job]) -> None:
        """Note which models to start from were never left, because their own cell failed."""
        starts = {job.start for job in cells if job.start}
        missing = starts - self.store.artifacts(starts).keys() - self.lost.keys()
        for key, row in self.store.cells(missing).items():
            status = "crashed" if row.status == "crashed" else "failed"
            self.lost[key] = Done(key, status, row.reason or "its model was not kept")

    def _results(self, jobs: Sequence[Job], title: str) -> Iterable[Done]:
        if jobs:
            self.bar.update(self.task, description=title)
        for done in self.executor.run(jobs):
            if done.status == "unwritable":
                raise CannotWrite(done.reason)
            yield done
            self.bar.advance(self.task)

    def _informed(self, cells: Sequence[Job]) -> list[Job]:
        """Cells with hashes of their models and the mean time of retraining, by what passes they share."""
        known = self.store.artifacts({key for job in cells for key in (*job.needs, job.start) if key})
        informed: list[Job] = []
        for job in sorted(cells, key=lambda job: job.affinity):
            times = [time for key in job.needs[1:] if (time := known[key].seconds) is not None]
            mean = float(np.mean(times)) if times else None
            hashes = tuple(known[key].sha256 for key in job.needs)
            start = known[job.start].sha256 if job.start else ""
            informed.append(replace(job, hashes=hashes, retraining_seconds=mean, start_hash=start))
        return informed

    def _put(self, job: Job, done: Done) -> None:
        kept = _artifact(job, done, "unlearned") if done.sha256 else None
        self.store.put_cell(_row(self.plan, job, done), kept)


def _artifact(job: Job, done: Done, kind: Literal["unlearned"] | None = None) -> ArtifactRow:
    return ArtifactRow(
        key=job.key, kind=kind or job.kind, place=place_of(job.place, job.key), sha256=done.sha256,
        seconds=done.seconds, created=now(),
    )  # fmt: skip


def _row(plan: Plan, job: Job, done: Done) -> CellRow:
    report = done.report
    findings = [
        FindingRow(
            position=position, audit=item["audit"], name=item["name"], value=item["value"], k=item["k"],
            judgement=item["judgement"], content=item,
        )
        for position, item in enumerate(report.get("findings", []))
    ]  # fmt: skip
    series = [SeriesRow(name=name, rows=rows) for name, rows in report.get("series", {}).items()]
    return CellRow(
        key=job.key, method=plan.method_name(job), label=job.title, request=plan.requests[job.request],
        seeds=job.seeds, status=done.status, reason=done.reason, detail=done.detail,
        verdict=report.get("verdict"), reasons=report.get("reasons", []), facts=report.get("facts", {}),
        seconds=done.seconds, peak_bytes=done.peak_bytes, started=done.started, finished=now(),
        findings=findings, series=series,
    )  # fmt: skip
