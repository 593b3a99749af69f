"""Forget and retain batches together: paired, alternating, one after the other, or in one mixture.

Every batch carries the ids of its records under `"id"`. The order comes from a generator that the caller
keeps over the epochs, so that each epoch is shuffled anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task

Side = Literal["forget", "retain"]


def shuffled(
    records: Records, task: Task, runtime: Runtime, batch_size: int, order: torch.Generator
) -> Iterator[Batch]:
    """One pass in random order, for training.

    A last batch of one single record is left out (another record in every epoch), because batch norm has
    no statistics of it; unless it is all there is, or batches of one were asked for.
    """
    for batch in runtime.batches(records, task, batch_size, shuffle=order):
        if len(batch["id"]) > 1 or len(records) == 1 or batch_size == 1:
            yield batch


def cycled(
    records: Records, task: Task, runtime: Runtime, batch_size: int, order: torch.Generator
) -> Iterator[Batch]:
    """Pass after pass without end, each shuffled anew."""
    while True:
        yield from shuffled(records, task, runtime, batch_size, order)


def paired(
    retain: Records,
    forget: Records,
    task: Task,
    runtime: Runtime,
    batch_size: int,
    order: torch.Generator,
    forget_batch_size: int | None = None,
) -> Iterator[tuple[Batch, Batch]]:
    """Pairs (retain batch, forget batch): retain is read once and defines the epoch, forget is cycled."""
    forever = cycled(forget, task, runtime, forget_batch_size or batch_size, order)
    for batch in shuffled(retain, task, runtime, batch_size, order):
        yield batch, next(forever)


def alternating(
    retain: Records,
    forget: Records,
    task: Task,
    runtime: Runtime,
    batch_size: int,
    order: torch.Generator,
    forget_batch_size: int | None = None,
) -> Iterator[tuple[Side, Batch]]:
    """A forget batch, a retain batch, and so on: the pairs of `paired`, one at a time."""
    for kept, gone in paired(retain, forget, task, runtime, batch_size, order, forget_batch_size):
        yield "forget", gone
        yield "retain", kept


def forget_then_retain(
    retain: Records,
    forget: Records,
    task: Task,
    runtime: Runtime,
    batch_size: int,
    order: torch.Generator,
    forget_batch_size: int | None = None,
) -> Iterator[tuple[Side, Batch]]:
    """All forget batches, then all retain batches."""
    for batch in shuffled(forget, task, runtime, forget_batch_size or batch_size, order):
        yield "forget", batch
    for batch in shuffled(retain, task, runtime, batch_size, order):
        yield "retain", batch


def mixed(
    train: Records,
    forget: Records,
    task: Task,
    runtime: Runtime,
    batch_size: int,
    order: torch.Generator,
) -> Iterator[tuple[Batch, Bool[Tensor, " batch"]]]:
    """One shuffled pass over all training records, each batch with the mask of its forget records."""
    gone = set(forget.ids)
    for batch in shuffled(train, task, runtime, batch_size, order):
        flags = [identifier in gone for identifier in batch["id"]]
        yield batch, torch.tensor(flags, device=runtime.torch_device)
