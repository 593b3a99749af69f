"""Shadow models: which of them was trained on which record, and what each said of it.

Attacks with shadow models (LiRA, RMIA, U-LiRA) need, for every record, models that saw it and models that
did not. The plan draws random halves of the records, the models are trained one after another, and only
their scores are kept. With a folder every finished run is on disk: a killed job goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import nn

from palimpsest.core.errors import InvalidAudit, UnreadableCheckpoint, shorten
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.core.writing import check_writable, write_bytes
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import TrainingRecipe, fit

Memberships = Bool[np.ndarray, "runs records"]
Scores = dict[str, np.ndarray]
"""Arrays by name, each with one entry per run first: [runs, ...]."""


@dataclass(frozen=True)
class ShadowPlan:
    """Which run has which record.

    Attributes:
        ids: Ids of the records in question.
        inside: Whether a run's model is trained on a record, [runs, records].
        facts: Everything else that the scores depend on, as plain data; runs on disk count only if they
            were made under the same ids, memberships and facts.
    """

    ids: tuple[str, ...]
    inside: Memberships
    facts: Mapping[str, Any]

    @property
    def runs(self) -> int:
        """Number of shadow runs."""
        return len(self.inside)

    @property
    def fingerprint(self) -> str:
        """Hash of the plan."""
        text = json.dumps([self.ids, dict(self.facts)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode() + np.packbits(self.inside).tobytes()).hexdigest()


def paired_halves(records: int, runs: int, random: np.random.Generator) -> Memberships:
    """Random halves in complementary pairs: of runs 2k and 2k + 1 exactly one has a given record.

    Every record is so in exactly half of an even number of runs.

    Raises:
        InvalidAudit: If there are fewer than 2 records or runs, or the number of runs is odd.
    """
    if records < 2 or runs < 2 or runs % 2:
        raise InvalidAudit(
            f"Shadow halves need 2 records and an even number of runs, at least 2: got {records} and {runs}."
        )
    first = np.zeros((runs // 2, records), bool)
    for row in first:
        row[random.permutation(records)[: records // 2]] = True
    return np.stack([first, ~first], axis=1).reshape(runs, records)


def check_coverage(inside: Memberships, least: int = 2) -> None:
    """Check that every record has enough models on either side.

    Raises:
        InvalidAudit: If a record is in or out of fewer than `least` models, naming it.
    """
    counts = np.minimum(inside.sum(0), (~inside).sum(0))
    few = np.flatnonzero(counts < least)
    if len(few):
        raise InvalidAudit(
            f"Every record needs {least} shadow models with it and {least} without; {len(few)} have fewer "
            f"(positions {shorten(few.tolist())}). Train more shadow models."
        )


def train_shadow(
    model: nn.Module, records: Records, task: Task, runtime: Runtime, recipe: TrainingRecipe
) -> nn.Module:
    """A fresh model of the same architecture, trained on records; the runtime's seed decides all of it."""
    return fit(reinitialised(model, runtime), records, task, runtime, recipe)


def run_shadows(
    plan: ShadowPlan,
    work: Callable[[int, Bool[np.ndarray, " records"]], Mapping[str, np.ndarray]],
    runtime: Runtime,
    folder: str | Path | None = None,
) -> Scores:
    """Do the work of every run, or read it from the folder if it was done before.

    Args:
        plan: What each run is trained on.
        work: Takes a run's number and its row of memberships, trains, and returns arrays by name, the
            same names and shapes in every run.
        runtime: For the progress bar.
        folder: Where finished runs are kept; None keeps them in memory only.

    Returns:
        The arrays of all runs stacked, each [runs, ...].

    Raises:
        CannotWrite: If the folder cannot be written, before any work.
        InvalidAudit: If the folder holds runs of another plan.
        UnreadableCheckpoint: If a file in it is damaged.
    """
    place = check_writable(folder) if folder is not None else None
    done: dict[int, Mapping[str, np.ndarray]] = {}
    for run in range(plan.runs):
        found = _load(place, run, plan.fingerprint) if place is not None else None
        if found is not None:
            done[run] = found
    for run in runtime.track(range(plan.runs), "shadow models"):
        if run in done:
            continue
        done[run] = {
            name: np.asarray(values, np.float64) for name, values in work(run, plan.inside[run]).items()
        }
        if place is not None:
            _save(place, run, plan.fingerprint, done[run])
    return {name: np.stack([done[run][name] for run in range(plan.runs)]) for name in done[0]}


def _path(folder: Path, run: int) -> Path:
    return folder / f"shadow-{run:04d}.safetensors"


def _save(folder: Path, run: int, fingerprint: str, scores: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(values) for name, values in scores.items()}
    write_bytes(_path(folder, run), save(arrays, metadata={"plan": fingerprint}))


def _load(folder: Path, run: int, fingerprint: str) -> dict[str, np.ndarray] | None:
    from safetensors import SafetensorError, safe_open

    path = _path(folder, run)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            made_for = (file.metadata() or {}).get("plan")
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise UnreadableCheckpoint(
            f"{path} is damaged ({problem}). Delete it: the run will be made again."
        ) from problem
    if made_for != fingerprint:
        raise InvalidAudit(
            f"{folder} holds shadow runs of another plan (other records, method, settings or seed). "
            "Choose an empty folder."
        )
    return scores
