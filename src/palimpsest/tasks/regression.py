"""Regression: one or several numbers per record, one output each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    InvalidRecords,
    ModelMismatch,
    NonFinite,
    shorten,
)
from palimpsest.core.records import Batch, Records
from palimpsest.core.task import Observation
from palimpsest.parts.activations import capture, features_with_graph
from palimpsest.tasks._checking import check_inputs, first_outputs
from palimpsest.tasks.registry import task

LOSSES = ("mse", "mae", "huber", "quantile")


@task("regression")
@dataclass(frozen=True)
class Regression:
    """Regression of one or several targets, of images, tables or anything else that a network takes.

    Works with any model whose output for `batch[input]` is a tensor [batch], [batch, 1] or [batch, k] (or
    an object with such a tensor as `logits`), and targets of the shapes [batch], [batch, 1] or [batch, k].
    Both are brought to [batch, k] before they meet: [batch, 1] against [batch] would broadcast to a
    square. `logits` are the outputs as they come; `predictions` are in the units of the targets. Nothing
    is clamped.

    The released regression networks answer in the units of the targets, which is the default here
    (`center` 0, `scale` 1). A network of default initialisation learns large numbers slowly; it then
    answers in units of `scale` from `center`, and the loss is in these units too, so that learning rates
    and weights of losses do not depend on what targets are measured in.

    Attributes:
        loss: "mse", "mae" or "huber", per example a mean over its targets; or "quantile", the pinball loss
            of one target summed over `quantiles`, one output each.
        delta: Where the Huber loss turns from square to linear, in units of `scale`.
        quantiles: Levels, ascending, in (0, 1); the one nearest to 0.5 is the prediction.
        tolerance: An answer within so much of the target, in units of `scale`, counts as right where audits
            count right answers (relearning, quantization and the like).
        center: What an output of 0 means, in units of the targets; one number, or one per target.
        scale: What an output of 1 is above that.
        standardise: Take `center` and `scale` from the training targets (`fitted`): mean and deviation.
        input: Field of a record that the model is given.
        label: Field with the target.
        head: Name of the module whose input are the features; by default the last linear layer.
        layers: Names of the layers that representation audits look at; by default the weight layers.
    """

    loss: Literal["mse", "mae", "huber", "quantile"] = "mse"
    delta: float = 1.0
    quantiles: tuple[float, ...] = ()
    tolerance: float = 0.5
    center: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0
    standardise: bool = False
    input: str = "input"
    label: str = "label"
    head: str | None = None
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidHyperparameter(f"loss must be one of {', '.join(LOSSES)}, not {self.loss!r}.")
        levels = np.asarray(self.quantiles, np.float64)
        if (self.loss == "quantile") != bool(levels.size):
            raise InvalidHyperparameter("quantiles go with loss='quantile', and only with it.")
        if ((levels <= 0) | (levels >= 1)).any() or (np.diff(levels) <= 0).any():
            raise InvalidHyperparameter(
                f"quantiles must ascend between 0 and 1, they are {list(self.quantiles)}."
            )
        if not 0 < self.delta < float("inf"):
            raise InvalidHyperparameter(f"delta must be above 0 and finite, not {self.delta!r}.")
        if not 0 < self.tolerance < float("inf"):
            raise InvalidHyperparameter(f"tolerance must be above 0 and finite, not {self.tolerance!r}.")
        center, scale = (np.asarray(value, np.float64) for value in (self.center, self.scale))
        if not np.isfinite(center).all() or not np.isfinite(scale).all() or (scale <= 0).any():
            raise InvalidHyperparameter(
                f"center must be finite and scale above 0, not {self.center!r} and {self.scale!r}."
            )

    @property
    def name(self) -> str:
        """Short name of the domain."""
        return "regression"

    def fitted(self, train: Records) -> Regression:
        """The task with `center` and `scale` of the training targets if it is to standardise, else itself.

        Mean and standard deviation (ddof 1) of each target over all training records, those to be forgotten
        among them: two numbers that a retrained model shares with the original.

        Raises:
            InvalidLabels, NonFinite: If the targets are no finite numbers.
            InvalidRecords: If a target is constant.
        """
        if not self.standardise:
            return self
        targets = self.all_targets(train)
        deviation = targets.std(0, ddof=1) if len(targets) > 1 else np.zeros(targets.shape[1])
        if not (deviation > 0).all():
            raise InvalidRecords(
                f"All training targets are {targets[0].tolist()}: constant targets have no scale."
            )
        mean = targets.mean(0)
        return replace(self, center=_plain(mean), scale=_plain(deviation), standardise=False)

    def outputs(self, records: Records) -> int:
        """How many outputs a model of these records needs."""
        return len(self.quantiles) or self.all_targets(records.select([0])).shape[1]

    def all_targets(self, records: Records) -> NDArray[np.float64]:
        """The targets of records in their own units, [records, targets].

        Raises:
            InvalidLabels: If there are none, or they are classes or no numbers.
            NonFinite: If they hold NaN or Inf.
        """
        return self._checked(records, self._read(records))

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Stack fields; numpy arrays and numbers become tensors."""
        batch: Batch = {
            key: default_collate([item[key] for item in items]) for key in items[0] if key != "id"
        }
        batch["id"] = [item["id"] for item in items]
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch outputs"]:
        """The model's outputs, with their graph; one column for a model that gives [batch]."""
        output = model(batch[self.input])
        return _columns(getattr(output, "logits", output))

    def predictions(self, outputs: Float[Tensor, "batch outputs"]) -> Float[Tensor, "batch targets"]:
        """Outputs in the units of the targets; of quantiles the one nearest to the median."""
        if self.quantiles:
            middle = int(np.abs(np.asarray(self.quantiles) - 0.5).argmin())
            outputs = outputs[:, middle : middle + 1]
        return self._like(self.center, outputs) + self._like(self.scale, outputs) * outputs

    def targets(self, batch: Batch) -> Float[Tensor, "batch targets"]:
        """Targets of a batch in their own units."""
        return _columns(batch[self.label])

    def margin(
        self, outputs: Float[Tensor, "batch outputs"], targets: Float[Tensor, "batch targets"]
    ) -> Float[Tensor, " batch"]:
        """1 minus the absolute error (mean over targets) as a share of the tolerance: 0 or more is right."""
        error = (self.predictions(outputs) - targets.to(outputs.dtype)) / self._like(self.scale, outputs)
        return 1 - error.abs().mean(1) / self.tolerance

    def distance(
        self, one: Float[Tensor, "batch outputs"], other: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, " batch"]:
        """How far two outputs are apart, per example, in the terms of the loss (of quantiles absolute)."""
        if one.shape != other.shape:
            raise ModelMismatch(
                f"Outputs of shape {tuple(one.shape)} and {tuple(other.shape)} cannot be compared."
            )
        kind = {"mse": F.mse_loss, "huber": F.huber_loss}.get(self.loss, F.l1_loss)
        more = {"delta": self.delta} if self.loss == "huber" else {}
        return kind(one, other, reduction="none", **more).mean(1)

    def loss_of_logits(self, logits: Float[Tensor, "batch outputs"], batch: Batch) -> Float[Tensor, " batch"]:
        """Loss per example, in units of `scale`."""
        wanted = self.targets(batch).to(logits.dtype)
        wanted = (wanted - self._like(self.center, logits)) / self._like(self.scale, logits)
        if self.quantiles:
            return pinball(logits, wanted, self.quantiles)
        return self.distance(logits, wanted)

    def loss_per_example(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Loss per example, with its graph."""
        return self.loss_of_logits(self.logits(model, batch), batch)

    def features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch dim"]:
        """Input of the head (the penultimate representation), with its graph."""
        return features_with_graph(model, lambda: self.logits(model, batch), self.head)

    @torch.no_grad()
    def observe(self, model: nn.Module, batch: Batch) -> Observation:
        """Outputs, losses, features and pooled layers in one forward pass."""
        with capture(model, self.layers, self.head) as seen:
            logits = self.logits(model, batch)
        return Observation(logits, self.loss_of_logits(logits, batch), seen.head_input, dict(seen.layers))

    def check(self, model: nn.Module, records: Records, labels: bool = True) -> None:
        """Check targets, inputs and the model's outputs on a first batch, before any work.

        Raises:
            InvalidLabels: If there are no targets, or they are classes or no numbers.
            NonFinite: If targets or inputs hold NaN or Inf.
            ModelMismatch: If outputs are not a tensor [batch] or [batch, targets], or hold NaN.
            InvalidHyperparameter: If the task was told to standardise and was not fitted.
        """
        if self.standardise:
            raise InvalidHyperparameter(
                "The task is to standardise targets: fit it first, task = task.fitted(parts.train)."
            )
        batch = records.batch(np.arange(min(8, len(records))), self.collate)
        if self.input not in batch:
            have = sorted(set(batch) - {"id", "index"})
            raise ModelMismatch(
                f"Records have no field '{self.input}' (they have {have}): set Regression(input=...)."
            )
        check_inputs(self.input, batch, records)
        outputs = self._outputs(model, batch)
        if not labels:
            return
        wanted = len(self.quantiles) or self.all_targets(records).shape[1]
        if outputs != wanted:
            what = "outputs for so many quantiles" if self.quantiles else "targets"
            raise ModelMismatch(
                f"The model gives {outputs} outputs for {wanted} {what}. If they are the logits of classes, use "
                "Classification and a method for classifiers; else build the model with as many outputs."
            )
        for name, value in (("center", self.center), ("scale", self.scale)):
            if np.ndim(value) and len(np.ravel(value)) != wanted:
                raise ModelMismatch(f"{name} has {len(np.ravel(value))} values for {wanted} targets.")

    def _read(self, records: Records) -> NDArray[Any]:
        """Targets as they stand: from memory, from the column, else record by record."""
        tensors = records.tensors
        if tensors is not None:
            if self.label not in tensors:
                raise self._missing(sorted(tensors))
            return tensors[self.label].cpu().numpy()
        if self.label == "label" and records.has_column("label"):
            return records.column("label")
        items = [records[index] for index in range(len(records))]
        if self.label not in items[0]:
            raise self._missing(sorted(set(items[0]) - {"id", "index"}))
        return np.stack([np.asarray(item[self.label]) for item in items])

    def _missing(self, have: list[str]) -> InvalidLabels:
        return InvalidLabels(
            f"Records have no field '{self.label}' (they have {have}): set Regression(label=...)."
        )

    def _checked(self, records: Records, found: NDArray[Any]) -> NDArray[np.float64]:
        if found.dtype.kind in "iub":
            raise InvalidLabels(
                f"Targets are {found.dtype}, as labels of classes are (the first is {found.ravel()[0]!r}). Use "
                "Classification and a method for classifiers, or make them floating-point numbers if they are "
                "quantities."
            )
        if found.dtype.kind != "f" or found.ndim > 2:
            shape = tuple(found.shape)
            raise InvalidLabels(
                f"Targets must be numbers [records] or [records, targets]; they are {found.dtype} {shape}."
            )
        targets = found.reshape(len(found), -1).astype(np.float64)
        wrong = ~np.isfinite(targets).all(1)
        if wrong.any():
            names = np.asarray(records.ids, dtype=object)[wrong].tolist()
            raise NonFinite(f"{len(names)} records hold NaN or Inf as target: {shorten(names)}.")
        return targets

    def _outputs(self, model: nn.Module, batch: Batch) -> int:
        """Number of outputs of the model, checked on a batch."""
        n = len(batch["id"])
        given = first_outputs(model, batch, self.input, lambda moved: model(moved[self.input]))
        given = getattr(given, "logits", given)
        lone = isinstance(given, Tensor) and given.dim() == 0 and n == 1
        if not lone and (not isinstance(given, Tensor) or given.dim() not in (1, 2) or len(given) != n):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ModelMismatch(
                f"Regression needs outputs of shape [batch] or [batch, targets]; the model gave {shape} for a batch "
                f"of {n}."
            )
        if torch.isnan(given).any():
            raise ModelMismatch("The model gives NaN outputs.")
        return _columns(given).shape[1]

    def _like(self, value: float | tuple[float, ...], outputs: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=outputs.dtype, device=outputs.device)


def pinball(
    predicted: Float[Tensor, "batch quantiles"],
    wanted: Float[Tensor, "batch 1"],
    quantiles: Sequence[float],
) -> Float[Tensor, " batch"]:
    """Quantile loss per example, summed over the quantiles: max((q - 1) e, q e) of the error e = wanted - predicted.

    Raises:
        ModelMismatch: If there is not one output per quantile, or more than one target.

    Example:
        >>> pinball(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0]]), (0.1, 0.5))
        tensor([0.1000])
    """
    if predicted.shape[1] != len(quantiles) or wanted.shape[1] != 1:
        raise ModelMismatch(
            f"{len(quantiles)} quantiles of one target need outputs [batch, {len(quantiles)}]; there are "
            f"{tuple(predicted.shape)} for targets {tuple(wanted.shape)}."
        )
    levels = torch.as_tensor(quantiles, dtype=predicted.dtype, device=predicted.device)
    error = wanted - predicted
    return torch.maximum((levels - 1) * error, levels * error).sum(1)


def _columns(values: Tensor) -> Float[Tensor, "batch columns"]:
    """[batch] and a lone number as one column; [batch, columns] as it is."""
    return values.reshape(-1, 1) if values.dim() < 2 else values


def _plain(values: NDArray[np.float64]) -> float | tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    return numbers[0] if len(numbers) == 1 else numbers
