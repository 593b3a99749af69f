"""Evidence: the models to compare, with every forward pass made once and shared by all audits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Observation, Task

if TYPE_CHECKING:
    from palimpsest.core.unlearner import Unlearner

T = TypeVar("T")
ORIGINAL, UNLEARNED = "original", "unlearned"


@dataclass
class Evidence:
    """Original, unlearned and retrained models on the same records.

    Attributes:
        unlearned: The model that is judged.
        split: The erasure request.
        task: The domain.
        runtime: Seed, device, progress.
        original: The model before the request; None if it is not at hand.
        controls: Models retrained without the forget records, with different seeds.
        seconds: Time that the method took, and time of retraining, if known (`unlearned`, `retrained`).
        peak_bytes: Peak memory of the method, if known.
        method: What made the unlearned model, if it is known; attacks on a method repeat it on shadow models.
        folder: Where audits may keep what is dear to make (shadow models), shared by all audits of a study.
        limit: At most this many records of a part are looked at (a fixed random sample of larger ones).
    """

    unlearned: nn.Module
    split: ForgetSplit
    task: Task
    runtime: Runtime = field(default_factory=Runtime)
    original: nn.Module | None = None
    controls: Sequence[nn.Module] = ()
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    peak_bytes: int | None = None
    method: Unlearner | None = None
    folder: Path | None = None
    limit: int = 5000
    _observed: dict[tuple[str, str], Observation] = field(default_factory=dict[tuple[str, str], Observation])
    _parts: dict[str, Records] = field(default_factory=dict[str, Records])
    _memory: dict[tuple[str, Any], Any] = field(default_factory=dict[tuple[str, Any], Any])

    @property
    def control_roles(self) -> list[str]:
        """Names of the controls: "control 0", "control 1", ..."""
        return [f"control {index}" for index in range(len(self.controls))]

    @property
    def roles(self) -> list[str]:
        """Names of all models at hand, original first, then unlearned, then controls."""
        first = [ORIGINAL] if self.original is not None else []
        return [*first, UNLEARNED, *self.control_roles]

    def model(self, role: str) -> nn.Module:
        """The model in a role. Attacks must copy it before they change it.

        Raises:
            InvalidAudit: If there is no such model.
        """
        if role == UNLEARNED:
            return self.unlearned
        if role == ORIGINAL and self.original is not None:
            return self.original
        if role in self.control_roles:
            return self.controls[int(role.split()[1])]
        raise InvalidAudit(f"There is no model in the role '{role}'; at hand: {', '.join(self.roles)}.")

    def has(self, part: str) -> bool:
        """Whether a part of the split is at hand."""
        return part in self.split.parts

    def records(self, part: str) -> Records:
        """The records of a part that audits look at: all, or a fixed sample of `limit`.

        Raises:
            InvalidAudit: If the part is not at hand.
        """
        if part not in self._parts:
            if not self.has(part):
                raise InvalidAudit(f"The split has no {part} part; at hand: {', '.join(self.split.parts)}.")
            records = self.split.parts[part]
            if len(records) > self.limit:
                chosen = self.runtime.numpy("audit sample", part).permutation(len(records))[: self.limit]
                records = records.select(np.sort(chosen))
            self._parts[part] = records
        return self._parts[part]

    def observe(self, role: str, part: str) -> Observation:
        """Logits, losses, features and layers of a model on a part: one pass, kept on the CPU.

        Raises:
            ModelMismatch: If the model gives NaN.
        """
        key = (role, part)
        if key not in self._observed:
            self._observed[key] = observe_all(self.model(role), self.records(part), self.task, self.runtime)
            self.runtime.count_pass(f"{role}/{part}")
            if torch.isnan(self._observed[key].logits).any():
                raise ModelMismatch(f"The {role} model gives NaN outputs on the {part} part.")
        return self._observed[key]

    def labels(self, part: str) -> np.ndarray[Any, Any]:
        """Labels of a part, [records], aligned with `observe`.

        From the "label" column, or, where there is none, from the field that the task calls its label.
        """
        records = self.records(part)
        if records.has_column("label"):
            return records.column("label")
        return self.remember(("labels", part), lambda: self._read_labels(records), "records")

    def _read_labels(self, records: Records) -> np.ndarray[Any, Any]:
        name = getattr(self.task, "label", "label")
        batches = self.runtime.batches(records, self.task)
        return np.concatenate([torch.as_tensor(batch[name]).cpu().numpy() for batch in batches])

    def remember(self, key: Any, compute: Callable[[], T], role: str = UNLEARNED) -> T:
        """The value kept under `key` for a role, computed at the first call.

        For what several audits share, and for measurements of the original and the controls that stay the
        same when another model of the same request is judged (`judging`).
        """
        if (role, key) not in self._memory:
            self._memory[role, key] = compute()
        return self._memory[role, key]

    def judging(self, unlearned: nn.Module, **changes: Any) -> Evidence:
        """Evidence for another unlearned model, sharing all that is known of original and controls.

        Args:
            unlearned: The model to judge now.
            **changes: Other fields to set (`seconds`, `peak_bytes`, `method`).
        """
        kept = {key: value for key, value in self._observed.items() if key[0] != UNLEARNED}
        memory = {key: value for key, value in self._memory.items() if key[0] != UNLEARNED}
        return replace(
            self, unlearned=unlearned, _observed=kept, _parts=self._parts, _memory=memory, **changes
        )

    def free(self) -> None:
        """Forget all passes (memory), keep the models."""
        self._observed.clear()
        self._memory.clear()


@torch.no_grad()
def observe_all(model: nn.Module, records: Records, task: Task, runtime: Runtime) -> Observation:
    """One evaluation pass of a model over records, concatenated on the CPU."""
    seen: list[Observation] = []
    model = runtime.place(model)
    with evaluating(model):
        for batch in runtime.batches(records, task):
            seen.append(task.observe(model, batch))
    return Observation(
        logits=_join([item.logits for item in seen]),
        loss=_join([item.loss for item in seen]),
        features=_join_optional([item.features for item in seen]),
        layers={name: _join([item.layers[name] for item in seen]) for name in seen[0].layers},
        tokens={name: _join([item.tokens[name] for item in seen]) for name in seen[0].tokens},
    )


def _join(pieces: Sequence[Float[Tensor, "batch ..."]]) -> Float[Tensor, "records ..."]:
    return padded([piece.detach().float().cpu() for piece in pieces])


def padded(pieces: Sequence[Float[Tensor, "batch ..."]]) -> Float[Tensor, "records ..."]:
    """One tensor of all batches; where texts make them of different length, padded with 0."""
    if len({piece.shape[1:] for piece in pieces}) > 1:
        width = max(piece.shape[1] for piece in pieces)
        pieces = [F.pad(piece, (0, width - piece.shape[1])) for piece in pieces]
    return torch.cat(list(pieces))


def _join_optional(pieces: Sequence[Tensor | None]) -> Tensor | None:
    present = [piece for piece in pieces if piece is not None]
    return _join(present) if len(present) == len(pieces) and present else None
