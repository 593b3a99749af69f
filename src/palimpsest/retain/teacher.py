"""The model as it was: a frozen copy that a learner is held to."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from palimpsest.core.errors import ModelMismatch
from palimpsest.parts.parameters import trainable


def snapshot(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that does not train."""
    frozen = copy.deepcopy(model).eval()
    return frozen.requires_grad_(False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def check_old(new: Tensor, old: Tensor) -> None:
    """Check that old outputs can be compared with new ones.

    Raises:
        ModelMismatch: If their shapes differ.
    """
    if new.shape != old.shape:
        raise ModelMismatch(
            f"The old network gives outputs of shape {tuple(old.shape)}, the new one {tuple(new.shape)}: both must "
            "know the same classes."
        )
