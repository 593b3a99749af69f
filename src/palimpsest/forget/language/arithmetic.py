"""Task vectors: subtract from a model's weights what fine-tuning on the forget data would add.

Ilharco et al. 2023, "Editing Models with Task Arithmetic", arXiv 2212.04089. State dicts in, state dict out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from palimpsest.core.errors import ModelMismatch, shorten
from palimpsest.core.unlearner import check_range

State = Mapping[str, Tensor]


def negate_task_vector(
    target: State, reinforced: State, base: State | None = None, scale: float = 1.0
) -> dict[str, Tensor]:
    """Weights target - scale * (reinforced - base); integer and boolean tensors are the target's.

    Computed in single precision at least, and given in the target's. Nothing is shared with the inputs.

    Args:
        target: Weights that must forget.
        reinforced: Weights after fine-tuning on the forget data.
        base: Weights from which that fine-tuning started; the target's by default (MUSE).
        scale: At least 0; 0 gives the target exactly.

    Raises:
        ModelMismatch: If names or shapes differ, or the vector is zero.
        InvalidHyperparameter: If the scale is negative or not finite.
    """
    check_range("scale", scale, 0, float("inf"))
    base = target if base is None else base
    for kind, state in (("reinforced", reinforced), ("base", base)):
        _check_same(target, state, kind)
    floating = [name for name, value in target.items() if value.is_floating_point()]
    if all(torch.equal(reinforced[name], base[name]) for name in floating):
        raise ModelMismatch("The task vector is zero: the reinforced weights are those of the base.")
    found = {name: value.detach().clone() for name, value in target.items()}
    if scale == 0:
        return found
    for name in floating:
        precision = torch.promote_types(target[name].dtype, torch.float32)
        vector = reinforced[name].detach().to(precision) - base[name].detach().to(precision)
        found[name] = (found[name].to(precision) - scale * vector).to(target[name].dtype)
    return found


def _check_same(target: State, other: State, kind: str) -> None:
    odd = sorted(set(target) ^ set(other))
    if odd:
        raise ModelMismatch(
            f"The target and the {kind} model differ in the names of {len(odd)} tensors: {shorten(odd)}."
        )
    for name, value in target.items():
        if other[name].shape != value.shape:
            raise ModelMismatch(
                f"'{name}' has shape {tuple(value.shape)} in the target and {tuple(other[name].shape)} in the {kind} model."
            )
