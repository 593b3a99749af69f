"""Runtime: seed, device, progress and processes; the only place where they are known."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from palimpsest.core.errors import MissingDependency
from palimpsest.core.modes import seeded
from palimpsest.core.records import Batch, Records
from palimpsest.core.task import Task

T = TypeVar("T")
log = logging.getLogger("palimpsest")
STRETCH = 32
"""Batches among which records of similar length look for each other."""


@dataclass(frozen=True)
class Runtime:
    """Where and how work is done.

    Attributes:
        seed: Root of every random number. Streams for different purposes are derived by name, so that
            adding one does not shift another.
        device: "auto" takes CUDA, then Apple's MPS, then the CPU.
        batch_size: For passes without training.
        workers: Loader processes for data that do not lie in memory.
        progress: Whether to draw progress bars on standard error.
        threads: CPU threads for torch while `limited` is entered; None leaves torch's own setting.
            Sums depend on the number of threads in the last bit, so a study fixes it.
    """

    seed: int = 0
    device: str = "auto"
    batch_size: int = 256
    workers: int = 0
    progress: bool = False
    threads: int | None = None
    _passes: dict[str, int] = field(default_factory=dict[str, int], repr=False, compare=False)

    @cached_property
    def torch_device(self) -> torch.device:
        """The device that models and batches are moved to."""
        if self.device != "auto":
            return torch.device(self.device)
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    @cached_property
    def accelerator(self) -> Any:
        """The Accelerate `Accelerator`, for training over several processes (`accelerate launch`)."""
        try:
            from accelerate import Accelerator
        except ImportError as missing:
            raise MissingDependency("accelerate", "distributed") from missing
        return Accelerator(cpu=self.torch_device.type == "cpu")

    @property
    def processes(self) -> int:
        """Processes that work together (`accelerate launch`), 1 for a single one."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return int(os.environ.get("RANK", "0"))

    def shared(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer made ready for training over all processes; as they are for a single one."""
        return self.accelerator.prepare(model, optimizer) if self.processes > 1 else (model, optimizer)

    def total(self, count: int) -> int:
        """The sum of a count over all processes."""
        if self.processes == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.torch_device), "sum"))

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes; itself for a single one."""
        return values if self.processes == 1 else self.accelerator.reduce(values, "mean")

    def derive(self, *names: object) -> int:
        """A seed for the stream called `names`, independent of other streams of this runtime."""
        text = "/".join(str(part) for part in (self.seed, *names))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def generator(self, *names: object) -> torch.Generator:
        """A CPU torch generator for the stream called `names`."""
        return torch.Generator().manual_seed(self.derive(*names))

    def numpy(self, *names: object) -> np.random.Generator:
        """A numpy generator for the stream called `names`."""
        return np.random.default_rng(self.derive(*names))

    def seeded(self, *names: object) -> AbstractContextManager[None]:
        """Torch's global random state (dropout, initialisation) set for a stream, restored after."""
        return seeded(self.derive(*names), self.torch_device)

    def with_seed(self, seed: int) -> Runtime:
        """The same runtime with another root seed."""
        return replace(self, seed=seed)

    @contextmanager
    def limited(self) -> Generator[None]:
        """Torch, BLAS and OpenMP limited to `threads` CPU threads, restored after."""
        before = torch.get_num_threads()
        with threadpool_limits(self.threads):
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this runtime's device."""
        return model.to(self.torch_device)

    def to_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on this runtime's device."""
        if self.torch_device.type == "cpu":
            return batch
        return {
            key: value.to(self.torch_device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def batches(
        self,
        records: Records,
        task: Task,
        batch_size: int | None = None,
        shuffle: torch.Generator | None = None,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[Batch]:
        """One pass over the records in batches, on the device.

        Args:
            records: To read.
            task: Whose `collate` makes the batches.
            batch_size: `self.batch_size` by default.
            shuffle: A generator to draw the order from; None keeps the order.
            drop_last: Leave out a last batch that is not full (never the only one).
            lengths: Of the records; those of similar length then share a batch, and batches come in a drawn order.
        """
        size = batch_size or self.batch_size
        n = len(records)
        order = np.arange(n) if shuffle is None else torch.randperm(n, generator=shuffle).numpy()
        stop = n - n % size if drop_last and n > size else n
        if lengths is not None:
            order = _sorted_in_stretches(order[:stop], np.asarray(lengths), size * STRETCH)
        chunks = [order[start : start + size] for start in range(0, stop, size)]
        if lengths is not None and shuffle is not None:
            chunks = [chunks[at] for at in torch.randperm(len(chunks), generator=shuffle).tolist()]
        if records.in_memory or self.workers == 0:
            for chunk in chunks:
                yield self.to_device(records.batch(chunk, task.collate))
            return
        loader: Iterable[Batch] = DataLoader(
            records,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            collate_fn=task.collate,
            num_workers=self.workers,
        )
        for batch in loader:
            yield self.to_device(batch)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Generator[T]:
        """The items, with a progress bar if this runtime shows progress."""
        if not self.progress:
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        yield from track(items, description, total=total, console=console, transient=True)

    def count_pass(self, what: str) -> None:
        """Note that one forward pass over a part was made (for benchmarks)."""
        self._passes[what] = self._passes.get(what, 0) + 1

    @property
    def passes(self) -> dict[str, int]:
        """Forward passes made so far, by what they were for."""
        return dict(self._passes)


def _sorted_in_stretches(
    order: NDArray[np.int64], lengths: NDArray[np.int64], stretch: int
) -> NDArray[np.int64]:
    """The order, with every stretch of it sorted by length."""
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    return np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
