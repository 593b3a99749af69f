"""Shadow models: which of them was trained on which record, and the folder where they are kept.

Attacks with shadow models (LiRA, RMIA, U-LiRA) need, for every record, models that saw it and models that
did not. Each shadow model is an artifact named by a hash of all that determines it: architecture, training
recipe, content of its training records, seed. What is there is never trained again, whichever audit asks:
a killed study of shadow models goes on where it was, a larger one adds to it, and attacks on other methods
or with other settings find the same models. Several processes may fill one folder together.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float, Int
from torch import nn

from palimpsest.audit.membership.signals import scaled_confidence
from palimpsest.core.errors import CannotWrite, InvalidAudit, NonFiniteLoss, UnreadableCheckpoint, shorten
from palimpsest.core.evidence import observe_all
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Unlearner
from palimpsest.core.writing import check_writable, write_bytes, write_text
from palimpsest.parts.checkpoint import load_model, save_model
from palimpsest.parts.fingerprint import architecture_fingerprint, record_digests
from palimpsest.parts.processes import in_processes
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import RECIPE_ATTRIBUTE, TrainingRecipe, fit

SCHEMA = 1
"""Raised whenever shadow models of an older version cannot be reused."""
Memberships = Bool[np.ndarray, "runs records"]
Positions = Int[np.ndarray, " chosen"]


def paired_halves(records: int, runs: int, random: np.random.Generator) -> Memberships:
    """Random halves in complementary pairs: of runs 2k and 2k + 1 exactly one has a given record.

    Every record is so in exactly half of an even number of runs. More runs begin with the same pairs.

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


@dataclass(frozen=True)
class ShadowModel:
    """A shadow model by what it comes from: plain data, so that any process can make it.

    Attributes:
        key: Content hash; the name of its files.
        records: Positions in the pool that it is trained on.
        seed: Of all that is random in making it.
        forgets: Positions that a method then makes it forget; empty for a model that is only trained.
        start: Key of the trained model that forgetting starts from.
    """

    key: str
    records: Positions
    seed: int
    forgets: Positions = field(default_factory=lambda: np.empty(0, np.int64))
    start: str = ""


@dataclass(frozen=True)
class Seen:
    """What a model says of the watched records.

    Attributes:
        phi: Logit-scaled confidence in the label.
        right: Whether the label is the most likely class.
    """

    phi: Float[np.ndarray, " watched"]
    right: Bool[np.ndarray, " watched"]


@dataclass(frozen=True)
class ShadowStudy:
    """Shadow models over a pool of records, made on demand and kept in a folder.

    Attributes:
        base: Of the architecture; its weights do not matter.
        pool: All records that shadow models are trained on.
        watched: Records whose scores are of interest.
        task: The domain.
        runtime: Device, progress and threads.
        recipe: How shadow models are trained.
        folder: Where they are kept.
        workers: Processes that make them side by side; 0 works in this one. Sums depend on the number of
            CPU threads in the last bit: `Runtime.threads` fixes it.
        test: Records of the test part, for methods that ask for it.
    """

    base: nn.Module
    pool: Records
    watched: Records
    task: Task
    runtime: Runtime
    recipe: TrainingRecipe
    folder: Path
    workers: int = 0
    test: Records | None = None

    def trained(self, records: Positions, seed: int) -> ShadowModel:
        """The shadow model trained on records at these positions of the pool."""
        content = hashlib.sha256(b"".join(self._digests[position] for position in records)).hexdigest()
        return ShadowModel(_hash("trained", *self._facts, content, seed), records, seed)

    def forgetting(
        self, start: ShadowModel, forgets: Positions, unlearner: Unlearner, seed: int
    ) -> ShadowModel:
        """That model after a method has forgotten the records at these positions.

        Only what it says of the watched records is kept: a method may return a model of another class.
        """
        said = [start.key, unlearner.card.name, repr(unlearner), type(unlearner).__module__, self._watched]
        content = hashlib.sha256(b"".join(self._digests[position] for position in forgets)).hexdigest()
        return ShadowModel(_hash("forgetting", *said, content, seed), start.records, seed, forgets, start.key)

    def make(self, models: Sequence[ShadowModel], unlearner: Unlearner | None = None) -> int:
        """Make what is not there yet; what another process is making is left to it and waited for.

        Args:
            models: Of one kind; trained ones before those that forget.
            unlearner: The method of those that forget.

        Returns:
            How many were made here.

        Raises:
            CannotWrite, UnreadableCheckpoint: If the folder cannot be written, or a file in it is damaged,
                before any work.
            WorkerFailed, NonFiniteLoss: If making one failed; those that were finished are kept.
        """
        check_writable(self.folder)
        wanted = {model.key: model for model in models}
        missing = [model for model in wanted.values() if not is_made(self.folder, model)]
        for key in wanted.keys() - {model.key for model in missing}:
            check_sound(self.folder, wanted[key])
        quiet = replace(self.runtime, progress=False)
        base = copy.deepcopy(self.base).cpu()
        maker = _Maker(replace(self, base=base, runtime=quiet), unlearner)
        what = "shadow models" if unlearner is None else f"shadow models: {unlearner.card.name}"
        made: list[bool] = []
        busy: set[str] = set()
        first = in_processes(maker, missing, min(self.workers, len(missing)))
        for key, done in self.runtime.track(first, what, total=len(missing)):
            made.append(done)
            busy |= set() if done or is_made(self.folder, wanted[key]) else {key}
        patient = replace(maker, patient=True)
        return sum(made) + sum(patient(wanted[key])[1] for key in busy)

    def seen(self, model: ShadowModel) -> Seen:
        """What a shadow model that was made says of the watched records.

        Raises:
            UnreadableCheckpoint: If a file is damaged or was changed, naming it.
        """
        if not len(model.forgets):
            return observed(self.load(model), self.watched, self.task, self.runtime)
        from safetensors.numpy import load

        check_sound(self.folder, model)
        found = load(_weights(self.folder, model.key).read_bytes())
        return Seen(found["phi"], found["right"].astype(bool))

    def load(self, model: ShadowModel) -> nn.Module:
        """The weights of a trained shadow model.

        Raises:
            UnreadableCheckpoint: If a file is damaged or was changed, naming it.
        """
        check_sound(self.folder, model)
        return load_model(_weights(self.folder, model.key), self.base)

    @cached_property
    def _digests(self) -> list[bytes]:
        return record_digests(self.pool)

    @cached_property
    def _watched(self) -> str:
        return hashlib.sha256(b"".join(record_digests(self.watched))).hexdigest()

    @cached_property
    def _facts(self) -> list[Any]:
        kind = self.runtime.torch_device.type
        return [SCHEMA, architecture_fingerprint(self.base), self.recipe.to_dict(), repr(self.task), kind]


AGAIN = "the shadow model will be made again."


def observed(model: nn.Module, records: Records, task: Task, runtime: Runtime) -> Seen:
    """What a model says of records."""
    labels = torch.from_numpy(records.column("label").astype(np.int64))
    logits = observe_all(model, records, task, runtime).logits
    return Seen(scaled_confidence(logits, labels).numpy(), (logits.argmax(1) == labels).numpy())


def is_made(folder: Path, model: ShadowModel) -> bool:
    """Whether a shadow model is finished; its note is written last."""
    return _note(folder, model.key).is_file() and _weights(folder, model.key).is_file()


def check_sound(folder: Path, model: ShadowModel) -> None:
    """Check that a finished shadow model is what was written.

    Raises:
        UnreadableCheckpoint: If a file is damaged or was changed, naming it.
    """
    place, note = _weights(folder, model.key), _note(folder, model.key)
    try:
        wanted = json.loads(note.read_text(encoding="utf-8")).get("sha256")
        found = hashlib.sha256(place.read_bytes()).hexdigest()
    except (OSError, ValueError, AttributeError) as problem:
        raise UnreadableCheckpoint(f"{note} cannot be read ({problem}). Delete it: {AGAIN}") from problem
    if found != wanted:
        raise UnreadableCheckpoint(f"{place} is damaged or was changed. Delete it: {AGAIN}")


@dataclass(frozen=True)
class _Maker:
    """Makes one shadow model, in whatever process it stands.

    Attributes:
        study: With the folder.
        unlearner: The method of models that forget.
        patient: Whether to wait for another process that is making the same model.
    """

    study: ShadowStudy
    unlearner: Unlearner | None
    patient: bool = False

    def __call__(self, model: ShadowModel) -> tuple[str, bool]:
        """The key, and whether the model was made here; not if it is there or another process is at it."""
        folder = self.study.folder
        lock = FileLock(folder / f"{model.key}.lock")
        try:
            lock.acquire(timeout=-1 if self.patient else 0)
        except Timeout:
            return model.key, False
        except OSError as problem:
            raise CannotWrite(f"Cannot lock {lock.lock_file}: {problem.strerror or problem}.") from problem
        with lock:
            if is_made(folder, model):
                return model.key, False
            start = time.perf_counter()
            facts = self._forget(model) if len(model.forgets) else self._train(model)
            facts |= {"records": len(model.records), "seed": model.seed, "key": model.key}
            facts["seconds"] = round(time.perf_counter() - start, 3)
            write_text(_note(folder, model.key), json.dumps(facts, indent=1) + "\n")
        Path(lock.lock_file).unlink(missing_ok=True)
        return model.key, True

    def _train(self, model: ShadowModel) -> dict[str, Any]:
        study, runtime = self.study, self.study.runtime.with_seed(model.seed)
        with runtime.limited():
            records = study.pool.select(model.records)
            trained = train_shadow(study.base, records, study.task, runtime, study.recipe)
        sha256 = save_model(trained, _weights(study.folder, model.key), {"key": model.key})
        kind = type(study.base).__name__
        return {"kind": "trained", "sha256": sha256, "architecture": kind, "recipe": study.recipe.to_dict()}

    def _forget(self, model: ShadowModel) -> dict[str, Any]:
        assert self.unlearner is not None
        from safetensors.numpy import save

        study, runtime = self.study, self.study.runtime.with_seed(model.seed)
        kept = np.setdiff1d(model.records, model.forgets)
        request = ForgetSplit(
            study.pool.select(model.forgets),
            study.pool.select(kept),
            study.test,
            description="shadow request",
        )
        start = ShadowModel(model.start, model.records, model.seed)
        with runtime.limited():
            before = runtime.place(study.load(start))
            setattr(before, RECIPE_ATTRIBUTE, study.recipe)
            after = self.unlearner.unlearn(before, request, study.task, runtime)
            after.eval()
            seen = observed(after, study.watched, study.task, runtime)
        if not np.isfinite(seen.phi).all():
            raise NonFiniteLoss(f"Method '{self.unlearner.card.name}' diverged on a shadow model.")
        data = save({"phi": np.ascontiguousarray(seen.phi, np.float64), "right": seen.right.astype(np.uint8)})
        write_bytes(_weights(study.folder, model.key), data)
        method = {"method": self.unlearner.card.name, "settings": repr(self.unlearner), "start": model.start}
        return {"kind": "forgetting", "sha256": hashlib.sha256(data).hexdigest(), **method}


def _weights(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _note(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def _hash(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return "shadow-" + hashlib.sha256(text.encode()).hexdigest()[:20]
