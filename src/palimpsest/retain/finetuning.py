"""Fine-tuning of chosen modules on a buffer; all other parameters stay as they are, to the bit."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFiniteLoss, NotTrained
from palimpsest.retain.buffers import Fields
from palimpsest.retain.heads import masked
from palimpsest.retain.methods.der import logit_distance
from palimpsest.retain.student import Student


def check_finetuning(iterations: int, lr: float, batch_size: int, distil: float, threshold: float) -> None:
    """Check the settings of fine-tuning.

    Raises:
        InvalidHyperparameter: Naming those that are refused.
    """
    if iterations < 1 or batch_size < 1 or not 0 < lr < math.inf or not 0 <= distil < math.inf:
        raise InvalidHyperparameter(
            "iterations and tuning_batch must be at least 1, tuning_lr above 0, distil at least 0, both finite; "
            f"not {iterations}, {batch_size}, {lr}, {distil}."
        )
    if not 0 < threshold <= 1:
        raise InvalidHyperparameter(f"threshold must lie in (0, 1], not {threshold}.")


def finetune(
    student: Student,
    rows: Fields,
    names: Sequence[str],
    *,
    iterations: int,
    lr: float,
    batch_size: int,
    distil: float = 0.0,
    statistics: bool = True,
    random: torch.Generator,
) -> int:
    """Descend on CE over all classes met (+ distil * MSE to stored logits), on buffered records alone.

    A new SGD without momentum or weight decay. Batches are drawn without replacement, in new views.

    Args:
        student: Whose network is tuned, in place.
        rows: The buffer's records: "input", "label", and "logits" if there is distillation.
        names: Parameters that move.
        iterations: K.
        lr: Learning rate.
        batch_size: Records per step.
        distil: lambda.
        statistics: Whether running statistics follow the buffer (training mode), or the network stays in
            evaluation mode.
        random: Draws the batches, so that those of a base learner stay as they were.

    Returns:
        Records whose gradients were taken.

    Raises:
        NotTrained: If the buffer is empty.
        ModelMismatch: If labels exceed the head, or logits are missing.
    """
    if not rows or len(rows["label"]) == 0:
        raise NotTrained("The buffer is empty: there is nothing to fine-tune on.")
    if int(rows["label"].max()) >= student.outputs:
        raise ModelMismatch(
            f"The buffer holds class {int(rows['label'].max())}, the head has {student.outputs} outputs."
        )
    if distil > 0 and "logits" not in rows:
        raise ModelMismatch(
            "Distillation needs logits in the buffer: take distil=0 or a base that stores them."
        )
    known = dict(student.model.named_parameters())
    moving = [known[name] for name in names]
    optimizer, count, used = torch.optim.SGD(moving, lr), len(rows["label"]), 0
    with _mode(student.model, statistics):
        for _ in range(iterations):
            drawn = torch.randperm(count, generator=random)[:batch_size]
            batch = student.augmented({name: value[drawn.to(value.device)] for name, value in rows.items()})
            logits = student.logits(batch)
            loss = F.cross_entropy(masked(logits, student.seen[: logits.shape[1]]), batch["label"])
            if distil > 0:
                loss = loss + distil * logit_distance(logits, batch["logits"])
            if not torch.isfinite(loss):
                raise NonFiniteLoss(f"The loss of fine-tuning became {loss.item()}: try a smaller tuning_lr.")
            for parameter, gradient in zip(moving, torch.autograd.grad(loss, moving), strict=True):
                parameter.grad = gradient
            optimizer.step()
            used += len(drawn)
    for parameter in moving:
        parameter.grad = None
    return used


def kept_values(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of some parameters and of all buffers: what fine-tuning may move."""
    known = dict(model.named_parameters())
    moved = {name: known[name] for name in names} | dict(model.named_buffers())
    return {name: value.detach().clone() for name, value in moved.items()}


@torch.no_grad()
def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Parameters and buffers as `kept_values` noted them."""
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values.items():
        known[name].copy_(value)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Generator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before
