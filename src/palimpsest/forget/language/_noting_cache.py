"""Keys and values of a model, kept together with those of models beside it and with notes on every row."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache


class NotingCache(DynamicCache):
    """A cache that takes along whatever a wrapper must remember of the rows that it has read.

    Beam search and scoring choose, repeat and reorder rows of the cache; what lies beside must follow.

    Attributes:
        beside: Caches of further models that read the same rows, by name.
        notes: Tensors with one entry per row, [rows, ...], by name.
        width: Tokens of a row, padding included, that the first call was given.
    """

    def __init__(self, config: Any = None):
        super().__init__(config=config)
        self.beside: dict[str, DynamicCache] = {}
        self.notes: dict[str, Tensor] = {}
        self.width = 0

    def cache_beside(self, name: str, config: Any = None) -> DynamicCache:
        """The cache of a further model, begun when it is first asked for."""
        if name not in self.beside:
            self.beside[name] = DynamicCache(config=config)
        return self.beside[name]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, or some of them twice."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        for cache in self.beside.values():
            cache.reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows, or some of them twice."""
        super().batch_select_indices(indices)
        for cache in self.beside.values():
            cache.batch_select_indices(indices)
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        for cache in self.beside.values():
            cache.batch_repeat_interleave(repeats)
        self.notes = {name: note.repeat_interleave(repeats, dim=0) for name, note in self.notes.items()}

    def _choose(self, rows: Tensor) -> None:
        self.notes = {name: note.index_select(0, rows.to(note.device)) for name, note in self.notes.items()}
