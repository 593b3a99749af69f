"""What a search found, on disk: whole or not at all, with everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from torch import nn

import palimpsest
from palimpsest.core.errors import InvalidRecipe
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.selection import Selection, by_ids
from palimpsest.core.unlearner import Unlearner
from palimpsest.core.writing import check_writable, write_text
from palimpsest.study.fingerprint import code_fingerprint, data_fingerprint
from palimpsest.study.recipe import content_hash

KIND, FORMAT = "worst-case-forget-set", 1
PART = ".part"
"""Suffix of the file that keeps an unfinished search beside its result."""
BARELY = 0.25
"""A search whose set shares more than 1 minus this with its random start has barely moved."""
History = list[dict[str, float]]


@dataclass(frozen=True)
class WorstCase:
    """A forget set that was searched for.

    Attributes:
        ids: Of its records, in the order of the training set.
        classes: Its classes, in a search by class.
        weights: The last continuous w, by record id (class): a score of difficulty. By "hardest" 1 is
            hardest to forget, by "easiest" 1 is easiest.
        settings: Everything that was said.
        fingerprint: Content hash of settings, data, model and code, without the number of steps.
        history: One entry per upper step: `objective` sum_i w_i l_i after the step, `penalty`, `set_loss`
            (mean loss of the chosen under the unlearned model), `mean_loss` (of all), `non_binary` (share
            of weights strictly between 0 and 1) and `moved` (share of the set that was not in the start).
        evaluation: Rows of `evaluate`, if it was run.
    """

    ids: tuple[str, ...]
    classes: tuple[Any, ...]
    weights: Mapping[str, float]
    settings: Mapping[str, Any]
    fingerprint: str
    history: tuple[Mapping[str, float], ...]
    evaluation: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def objective(self) -> float:
        """sum_i w_i l_i after the last upper step."""
        return self.history[-1]["objective"]

    @property
    def non_binary(self) -> float:
        """Share of weights that are neither 0 nor 1."""
        return self.history[-1]["non_binary"]

    @property
    def moved(self) -> float:
        """Share of the set that was not in the random start."""
        return self.history[-1]["moved"]

    @property
    def warning(self) -> str:
        """What is wrong with the search; empty if nothing is seen."""
        if self.moved >= BARELY:
            return ""
        return (
            f"Only {self.moved:.0%} of the set differ from the random start: w barely moved. Raise upper_lr "
            f"(it is {self.settings['upper_lr']:g}) or steps (now {len(self.history)})."
        )

    @property
    def caution(self) -> str:
        """What the lower level leaves open; empty where its implicit gradient is zero."""
        if self.settings["implicit_gradient"] == "zero":
            return ""
        return (
            f"The lower level '{self.settings['lower']}' does not move by signs of gradients: how its result "
            "depends on the choice was ignored."
        )

    def selection(self) -> Selection:
        """The set as a request for `split`."""
        return by_ids(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `--forget FILE` reads its "ids"."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "ids": list(self.ids),
            "classes": [item.item() if hasattr(item, "item") else item for item in self.classes],
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint,
            "palimpsest": palimpsest.__version__,
            "warning": self.warning,
            "caution": self.caution,
            "history": [dict(step) for step in self.history],
            "evaluation": [dict(row) for row in self.evaluation],
            "scores": dict(self.weights),
        }

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all.

        Raises:
            CannotWrite: For lack of permission or space.
        """
        return write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> WorstCase:
        """The inverse of `save`.

        Raises:
            InvalidRecipe: If the file holds no such set.
        """
        stored = _read(Path(path))
        try:
            return cls(
                ids=tuple(stored["ids"]),
                classes=tuple(stored["classes"]),
                weights=stored["scores"],
                settings=stored["settings"],
                fingerprint=stored["fingerprint"],
                history=tuple(stored["history"]),
                evaluation=tuple(stored["evaluation"]),
            )
        except KeyError as missing:
            raise InvalidRecipe(
                f"{path} holds no worst-case forget set: {missing} is not in it."
            ) from missing


@dataclass
class Progress:
    """An unfinished search beside the file of its result.

    Attributes:
        path: Of the result; None keeps nothing.
        key: Fingerprint of the search.
        state: Weights and history so far.
        evaluation: Rows that an earlier run found.
    """

    path: Path | None
    key: str
    state: tuple[Float[np.ndarray, " items"], History] | None = None
    evaluation: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def open(cls, out: str | Path | None, key: str, steps: int) -> Progress:
        """What an earlier run of the same search left.

        Raises:
            InvalidRecipe: If another search, a longer one or something else lies there.
            CannotWrite: If nothing can be written there.
        """
        if out is None:
            return cls(None, key)
        path = Path(out).absolute()
        for place, stored in found_at(path).items():
            if stored.get("fingerprint") != key:
                raise InvalidRecipe(
                    f"{place} holds another search (other data, model or settings). Remove it, or choose another file."
                )
            if len(stored["history"]) > steps:
                raise InvalidRecipe(
                    f"{place} holds {len(stored['history'])} steps of this search, more than the {steps} that are "
                    "asked for. Remove it, or choose another file."
                )
            state = (np.array(list(stored["scores"].values())), stored["history"])
            return cls(path, key, state, tuple(stored.get("evaluation", ())))
        check_writable(path.parent)
        return cls(path, key)

    def save(self, w: Float[np.ndarray, " items"], history: History) -> None:
        """Keep the state after an upper step."""
        if self.path is None:
            return
        scores = {str(number): value for number, value in enumerate(w.tolist())}
        stored = {"kind": KIND + PART, "fingerprint": self.key, "history": history, "scores": scores}
        write_text(_part(self.path), json.dumps(stored))

    def finish(self, result: WorstCase) -> None:
        """Write the result, and remove what was kept on the way."""
        if self.path is None:
            return
        if _part(self.path).exists() or not self.path.exists():
            result.save(self.path)
        _part(self.path).unlink(missing_ok=True)


def found_at(path: str | Path) -> dict[Path, dict[str, Any]]:
    """What lies where a result is to be written: an unfinished search, which goes further, then a result.

    Raises:
        InvalidRecipe: If something else lies there.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise InvalidRecipe(f"{path} is a folder: say a file for the result.")
    return {place: _read(place) for place in (_part(path), path) if place.exists()}


def search_key(
    model: nn.Module,
    records: Records,
    method: Unlearner,
    runtime: Runtime,
    about: Mapping[str, Any],
    start: list[float] | None,
) -> str:
    """Content hash of all that a search depends on; not of the number of steps, so that it can be extended."""
    said = {key: value for key, value in about.items() if key != "steps"}
    return content_hash(
        FORMAT, said, start, model_fingerprint(model), data_fingerprint(records),
        code_fingerprint(type(method)), runtime.torch_device.type, runtime.batch_size,
    )  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """A hash of a model's class, and of names and values of its weights and buffers."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:20]


def settings_of(method: Unlearner) -> dict[str, Any]:
    """A method's hyperparameters as plain data; what is no plain data by its text."""
    if not is_dataclass(method):
        return {"method": repr(method)}
    found = {item.name: getattr(method, item.name) for item in fields(method) if item.compare}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(cast(Any, value)).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast(list[Any], value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    return value if isinstance(value, str | int | float | bool) or value is None else repr(value)


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InvalidRecipe(f"Cannot read {path}: {problem.strerror}.") from problem
    except ValueError as problem:
        raise InvalidRecipe(
            f"{path} is no valid JSON: {problem}. Remove it, or choose another file."
        ) from problem
    if not isinstance(stored, dict) or not str(stored.get("kind", "")).startswith(KIND):
        raise InvalidRecipe(f"{path} holds no worst-case forget set. Choose another file.")
    return stored
