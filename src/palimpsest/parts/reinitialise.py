"""Fresh weights for any model: the start of every honest retraining."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from palimpsest.core.errors import ModelMismatch, NonFinite, shorten
from palimpsest.core.runtime import Runtime

START_ATTRIBUTE = "palimpsest_start"
"""Of a model that training starts from with weights learnt elsewhere: a function that gives them afresh."""


def starting(model: nn.Module, start: Callable[[], nn.Module]) -> nn.Module:
    """The model, marked as one whose retraining begins at what `start` returns."""
    setattr(model, START_ATTRIBUTE, start)
    return model


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is marked as one that started from weights learnt elsewhere."""
    return getattr(model, START_ATTRIBUTE, None) is not None


def fresh_start(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Where an honest retraining begins: the pretrained weights that a model started from, else new ones.

    What a pretrained model knew before the training data is no trace of them, and a model trained from
    nothing would be no measure of what fine-tuning left.
    """
    start: Callable[[], nn.Module] | None = getattr(model, START_ATTRIBUTE, None)
    if start is None:
        return reinitialised(model, runtime)
    fresh = start()
    setattr(fresh, START_ATTRIBUTE, start)
    return fresh


def reinitialised(model: nn.Module, runtime: Runtime) -> nn.Module:
    """A copy of a model with every parameter drawn anew and every buffer reset.

    Modules are reset through their own `reset_parameters` (or `init_weights` without arguments);
    parameters that a module owns directly beside such a method (class tokens, position embeddings) are
    drawn from a normal distribution with the mean and deviation of a truncated normal of 0.02, the
    convention for them.

    Args:
        model: The trained model; not changed.
        runtime: Source of the seed; the stream is `"reinitialise"`, so that a model built under the
            same seed does not come out again.

    Raises:
        ModelMismatch: If a trainable parameter came out unchanged, naming it.
    """
    fresh = copy.deepcopy(model)
    with runtime.seeded("reinitialise"), torch.no_grad():
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                nn.init.trunc_normal_(parameter, std=0.02)
    check_reinitialised(fresh, model)
    return fresh


def check_reinitialised(fresh: nn.Module, trained: nn.Module) -> None:
    """Check that no trainable parameter of `fresh` still equals the trained one.

    Constants (a batch-norm weight of ones) count as re-initialised if the trained value has left them;
    a trained tensor that never moved from its constant start cannot be told apart and passes.

    Raises:
        ModelMismatch: Naming the tensors that are still the trained ones.
    """
    before = dict(trained.named_parameters())
    same = [
        name
        for name, parameter in fresh.named_parameters()
        if parameter.requires_grad
        and torch.equal(parameter, before[name])
        and not (parameter == parameter.flatten()[0]).all()
    ]
    if same:
        raise ModelMismatch(
            f"Retraining must start from fresh weights, but {len(same)} parameters are still the trained ones: "
            f"{shorten(same)}. Give their modules a reset_parameters method."
        )


def check_finite(model: nn.Module, what: str = "model") -> None:
    """Check that weights and buffers hold no NaN or Inf.

    Raises:
        NonFinite: Naming the first tensor that does.
    """
    for name, tensor in model.state_dict().items():
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.is_floating_point()
            and not torch.isfinite(tensor).all()
        ):
            count = int((~torch.isfinite(tensor)).sum())
            raise NonFinite(f"The {what} has {count} NaN or Inf values in '{name}'.")
