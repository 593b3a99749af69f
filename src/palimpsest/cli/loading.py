"""The user's own records and models, from what stands on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    InvalidRecords,
    PalimpsestError,
    UnknownName,
)

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.core.runtime import Runtime
    from palimpsest.core.selection import Selection
    from palimpsest.core.split import ForgetSplit
    from palimpsest.core.task import Task


@dataclass(frozen=True)
class Architecture:
    """A network without weights.

    Attributes:
        name: As `palimpsest.models.build_model` takes it.
        settings: Passed on to its factory.
        classes: Number of outputs; None takes the largest label and one more, or what the task says.
        task: Name of the domain.
        task_settings: Settings of the domain.
    """

    name: str
    settings: dict[str, Any]
    classes: int | None = None
    task: str = "classification"
    task_settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def domain(self, parts: ForgetSplit) -> Task:
        """The task, fitted to the training records of a split.

        Raises:
            UnknownName, InvalidHyperparameter, InvalidRecords: If it cannot be used.
        """
        from palimpsest.tasks import build_task

        return build_task(self.task, self.task_settings, parts.train)

    def load(self, path: Path, parts: ForgetSplit) -> nn.Module:
        """The network with the weights of a safetensors file, fit for the records of a split.

        Raises:
            UnreadableCheckpoint, ModelMismatch, NonFinite: If the file or the weights do not fit.
            InvalidLabels: If the number of classes is neither given nor seen in the labels.
        """
        from palimpsest.parts.checkpoint import load_model

        return load_model(path, self.fresh(parts))

    def fresh(self, parts: ForgetSplit, seed: int = 0) -> nn.Module:
        """The network with initial weights.

        Raises:
            InvalidLabels: If the number of classes is neither given nor seen in the labels.
        """
        from palimpsest.models import build_model

        sample = parts.forget[0].get("input")
        if sample is None:
            raise InvalidRecords("The records have no field 'input' to give to the model.")
        return build_model(self.name, tuple(sample.shape), self._classes(parts), seed=seed, **self.settings)

    def _classes(self, parts: ForgetSplit) -> int:
        if self.classes is not None:
            return self.classes
        outputs = getattr(self.domain(parts), "outputs", None)
        if outputs is not None:
            return int(outputs(parts.forget))
        columns = [part.column("label") for part in parts.parts.values() if part.has_column("label")]
        if not columns or any(column.dtype.kind not in "iu" for column in columns):
            raise InvalidLabels(
                "The records have no integer 'label' column: say --classes, or --task regression."
            )
        return int(max(column.max() for column in columns)) + 1


def read_split(data: str, rule: str, test: str, holdout: str, seed: int) -> ForgetSplit:
    """The records of a data set, divided by an erasure request.

    Raises:
        UnknownName, InvalidRecords, InvalidRecipe, InvalidSplit: If data or rules cannot be used.
    """
    from palimpsest.core.split import split
    from palimpsest.data import parse_data
    from palimpsest.study.request import parse_request

    wanted = parse_request(rule).selection()
    return split(parse_data(data), wanted, _share(test), _share(holdout), seed)


def _share(text: str) -> float | Selection:
    try:
        return float(text)
    except ValueError:
        from palimpsest.study.request import parse_request

        return parse_request(text).selection()


def read_runtime(seed: int, device: str, progress: bool) -> Runtime:
    """Seed and device.

    Raises:
        InvalidHyperparameter: If the device is not there.
    """
    import torch

    from palimpsest.core.runtime import Runtime

    runtime = Runtime(seed=seed, device=device, progress=progress)
    try:
        torch.empty(0, device=runtime.torch_device)
    except (RuntimeError, AssertionError) as problem:
        raise InvalidHyperparameter(f"The device '{device}' cannot be used: {problem}") from problem
    return runtime


def read_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Settings written "key=value", values read as YAML.

    Raises:
        InvalidHyperparameter: If one is written otherwise.
    """
    import yaml

    from palimpsest.study.yaml_text import read_yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key.strip():
            raise InvalidHyperparameter(f"A setting is written key=value, not '{pair}'.")
        try:
            settings[key.strip()] = read_yaml(value)
        except yaml.YAMLError as problem:
            raise InvalidHyperparameter(f"The value in '{pair}' is no valid YAML: {problem}") from problem
    return settings


def read_audits(names: str | None, pairs: Iterable[str]) -> list[dict[str, Any]]:
    """Audits by name with their settings, written "audit.key=value".

    Raises:
        UnknownName: For a setting of an audit that is not among the names; suggests the nearest.
        InvalidHyperparameter: If a setting is written otherwise.
    """
    chosen: dict[str, dict[str, Any]] = {name: {} for name in listed(names)}
    for key, value in read_settings(pairs).items():
        audit, dot, setting = key.partition(".")
        if not dot or not setting:
            raise InvalidHyperparameter(
                f"The setting of an audit is written AUDIT.KEY=VALUE, not '{key}=...'."
            )
        if audit not in chosen:
            raise UnknownName("audit in --audits", audit, chosen)
        chosen[audit][setting] = value
    return [{"name": name, "settings": settings} for name, settings in chosen.items()]


def import_modules(names: Iterable[str]) -> None:
    """Import modules for what they register; the working folder is searched too.

    Raises:
        PalimpsestError: If one cannot be imported.
    """
    for name in names:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        try:
            importlib.import_module(name)
        except ImportError as problem:
            raise PalimpsestError(f"Cannot import '{name}': {problem}.") from problem


def listed(text: str | None) -> list[str]:
    """The items of a list written with commas."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def read_classes(text: str) -> int | list[int]:
    """A number of classes, or a list of them."""
    import typer

    try:
        numbers = [int(item) for item in listed(text)]
    except ValueError as problem:
        raise typer.BadParameter(f"--pretrain is a number or a list such as 7,8,9, not '{text}'") from problem
    if not numbers:
        raise typer.BadParameter("--pretrain is a number of classes, or a list of them")
    return numbers if "," in text else numbers[0]


def read_seeds(text: str) -> int | list[int]:
    """A number of seeds, or a list of them."""
    import typer

    try:
        numbers = [int(item) for item in listed(text)]
    except ValueError as problem:
        raise typer.BadParameter(f"--seeds is a number or a list such as 0,1,2, not '{text}'") from problem
    if "," not in text and not (numbers and numbers[0] >= 1):
        raise typer.BadParameter(f"--seeds is a number of seeds, at least 1, not '{text}'")
    return numbers if "," in text else numbers[0]
