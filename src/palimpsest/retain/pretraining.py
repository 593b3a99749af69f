"""Pretraining on classes that the stream does not have: what downloaded weights would give, without a download."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from palimpsest.core.errors import InvalidStream, ModelMismatch, shorten
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.activations import head_name
from palimpsest.parts.reinitialise import starting
from palimpsest.retain.running import learn
from palimpsest.retain.streams import class_incremental
from palimpsest.retain.student import Training


@dataclass(frozen=True)
class Pretrained:
    """An encoder that has learned other classes.

    Attributes:
        weights: Parameters and buffers by name, without the head's.
        accuracy: On held-out records of its own classes.
    """

    weights: Mapping[str, Tensor]
    accuracy: float


def set_apart(
    records: Records, classes: int | Sequence[int], draw: np.random.Generator | None = None
) -> tuple[tuple[int, ...], Records]:
    """Classes for pretraining, and the records of all others.

    Args:
        records: With an integer column "label".
        classes: Which, or how many.
        draw: Draws them, where only their number is given; None takes the largest labels.

    Raises:
        InvalidStream: If there are no such classes, fewer than two, one is named twice, or none is left.
    """
    labels = np.asarray(records.column("label"))
    known: list[int] = np.unique(labels).tolist()
    if isinstance(classes, int):
        chosen = known[max(0, len(known) - classes) :] if draw is None else _drawn(known, classes, draw)
        count = classes
    else:
        chosen, count = sorted({int(label) for label in classes}), len(classes)
        strange = sorted(set(chosen) - set(known))
        if strange or len(chosen) != count:
            raise InvalidStream(
                f"Classes for pretraining are named once each, from {shorten(known)}; not {list(classes)}."
            )
    if count < 2:
        raise InvalidStream(f"Pretraining needs at least 2 classes, not {count}.")
    if count >= len(known):
        raise InvalidStream(
            f"{count} of {len(known)} classes for pretraining leave none for the stream: name fewer."
        )
    return tuple(chosen), records.select(~np.isin(labels, chosen))


def pretrain(
    network: nn.Module,
    records: Records,
    training: Training,
    runtime: Runtime,
    test: float | Records = 0.2,
    task: Task | None = None,
) -> Pretrained:
    """Train a copy of a network on all classes of some records together.

    Args:
        network: With one output per class of the records.
        records: To learn.
        training: How.
        runtime: Seed and device.
        test: Share, or records, for `accuracy`.
        task: The domain; classification by default.
    """
    classes = np.unique(records.column("label")).tolist()
    stream = class_incremental(records, [len(classes)], test=test, name="pretraining")
    outcome = learn("finetune", stream, network, task=task, training=training, runtime=runtime)
    assert outcome.learner is not None
    model = outcome.learner.student.model
    head = getattr(task, "head", None) or head_name(model)
    weights = {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if not name.startswith(f"{head}.")
    }
    return Pretrained(weights, outcome.matrix.average)


def with_encoder(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with the weights of an encoder and its own, new head; marked as pretrained.

    Raises:
        ModelMismatch: If the weights are those of another architecture.
    """
    model = copy.deepcopy(network)
    own = model.state_dict()
    head = head_name(model)
    missing = [name for name in own if name not in weights and not name.startswith(f"{head}.")]
    other = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if missing or other:
        raise ModelMismatch(
            f"The pretrained encoder does not fit the network: {shorten([*missing, *other])}."
        )
    model.load_state_dict(weights, strict=False)
    return starting(model, lambda: with_encoder(network, weights))


def _drawn(known: Sequence[int], count: int, draw: np.random.Generator) -> list[int]:
    return sorted(int(known[place]) for place in draw.permutation(len(known))[:count])
