"""Which weights quantization and pruning touch."""

from __future__ import annotations

from torch import nn

from palimpsest.core.errors import UnknownName
from palimpsest.core.task import Task
from palimpsest.parts.activations import head_name

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def matrix_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of all linear and convolution layers and attention projections, by parameter name.

    Every one has its output rows (units, channels) along the first dimension. Embeddings,
    normalisations and biases are not among them; a weight shared by several layers counts once.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        names = ()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            names = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            names = _ATTENTION
        for kind in names:
            parameter = getattr(module, kind, None)
            if isinstance(parameter, nn.Parameter) and not any(
                parameter is other for other in found.values()
            ):
                found[f"{name}.{kind}" if name else kind] = parameter
    return found


def hidden_weights(model: nn.Module, task: Task) -> dict[str, nn.Parameter]:
    """`matrix_weights` without the head's, nor any that is shared with an embedding."""
    try:
        head = getattr(task, "head", None) or head_name(model)
    except UnknownName:
        return {}
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return {
        name: parameter
        for name, parameter in matrix_weights(model).items()
        if name.rpartition(".")[0] != head and not any(parameter is weight for weight in embeddings)
    }
