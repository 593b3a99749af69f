"""What learners with prompts share: a frozen network, its query, keys, blocks to prompt, the loss of new classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidStream
from palimpsest.core.records import Batch
from palimpsest.parts.activations import head_name
from palimpsest.retain.attention_blocks import Blocks, attention_blocks
from palimpsest.retain.heads import head_of, masked
from palimpsest.retain.student import Student

PUBLISHED_DEPTH = 5
"""Published prompts stand in the first five blocks."""


def frozen(student: Student) -> Blocks:
    """Freeze all but the head of a student's network, and find its blocks.

    Raises:
        ModelMismatch: If it is no vision transformer that can be prompted.
    """
    blocks = attention_blocks(student.model)
    student.model.requires_grad_(False)
    _head(student).requires_grad_(True)
    return blocks


def query_width(student: Student) -> int:
    """Length of a query: the inputs of the head."""
    weight = _head(student).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


@torch.no_grad()
def query(student: Student, batch: Batch) -> Float[Tensor, "batch dim"]:
    """What the network without prompts gives its head, the class token of a ViT. The network is in evaluation mode."""
    return student.features(batch)


def cosines(
    queries: Float[Tensor, "batch dim"], keys: Float[Tensor, "keys dim"]
) -> Float[Tensor, "batch keys"]:
    """Cosine of every query with every key."""
    return F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T


def new_class_loss(
    logits: Float[Tensor, "batch classes"], labels: Tensor, classes: Sequence[int]
) -> Float[Tensor, ""]:
    """Cross-entropy over the classes of the current experience alone; all others are minus infinity."""
    new = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    new[list(classes)] = True
    return F.cross_entropy(masked(logits, new), labels)


def anneal(student: Student, epoch: int, annealed: bool = True) -> None:
    """Cosine schedule over the epochs of an experience: lr (1 + cos(pi epoch / epochs)) / 2."""
    if annealed and student.optimizer is not None:
        share = (1 + math.cos(math.pi * epoch / student.training.epochs)) / 2
        for group in student.optimizer.param_groups:
            group["lr"] = student.training.lr * share


def halves(
    prompt: Float[Tensor, "batch length width"],
) -> tuple[Float[Tensor, "batch half width"], Float[Tensor, "batch half width"]]:
    """The first half of a prompt's rows as keys, the second as values."""
    half = prompt.shape[1] // 2
    return prompt[:, :half], prompt[:, half:]


def check_prefix(name: str, length: int) -> None:
    """A prefix has as many keys as values.

    Raises:
        InvalidHyperparameter: If its length is odd, or below 2.
    """
    if length < 2 or length % 2:
        raise InvalidHyperparameter(
            f"{name} must be even and at least 2, half of it keys and half values; not {length}."
        )


def check_spread(spread: float) -> None:
    """Prompts and keys begin with values around 0.

    Raises:
        InvalidHyperparameter: If all would be 0 (a key without direction), or not finite.
    """
    if not 0 < spread < math.inf:
        raise InvalidHyperparameter(f"spread must be above 0 and finite, not {spread}.")


def check_weight(name: str, value: float) -> None:
    """Weights of loss terms.

    Raises:
        InvalidHyperparameter: If one is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise InvalidHyperparameter(f"{name} must be at least 0 and finite, not {value}.")


def check_blocks(name: str, chosen: Sequence[int], blocks: Blocks) -> tuple[int, ...]:
    """Numbers of blocks, each once.

    Raises:
        InvalidHyperparameter: If the network has no such block, or one is named twice.
    """
    wrong = [number for number in chosen if not 0 <= number < len(blocks)]
    if wrong:
        raise InvalidHyperparameter(
            f"{name} names block {wrong[0]}; the network has {len(blocks)}, from 0 to {len(blocks) - 1}."
        )
    if len(set(chosen)) < len(chosen):
        raise InvalidHyperparameter(f"{name} names a block twice: {list(chosen)}.")
    return tuple(chosen)


def check_kept_optimizer(student: Student) -> None:
    """Prompts of a new experience are new to an optimiser.

    Raises:
        InvalidHyperparameter: If the optimiser is to be kept.
    """
    if student.training.keep_optimizer:
        raise InvalidHyperparameter(
            "keep_optimizer cannot be kept: the prompts of a new experience need a new optimiser."
        )


def check_tasks(index: int, tasks: int) -> None:
    """Prompts are there for a number of experiences that is said at the beginning.

    Raises:
        InvalidStream: If another one comes.
    """
    if index >= tasks:
        raise InvalidStream(
            f"Experience {index} is number {index + 1}; there are prompts for tasks={tasks}: set tasks to the "
            "number of experiences."
        )


def only_trains(parts: nn.ParameterList, index: int) -> None:
    """Let the part of one experience train, and those of no other."""
    for number, parameter in enumerate(parts):
        parameter.requires_grad_(number == index)


def uniform(*shape: int, spread: float) -> nn.Parameter:
    """Uniform in [-spread, spread), from torch's global random state."""
    return nn.Parameter((torch.rand(shape) * 2 - 1) * spread)


def _head(student: Student) -> nn.Module:
    return head_of(student.model, getattr(student.task, "head", None) or head_name(student.model))
