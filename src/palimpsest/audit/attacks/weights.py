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
    """`matrix_weights` without the head's, nor any that is shared with an embedding.

    Language models say which layer their head is; of several models in one (an assistant beside a model, a
    classifier before it) every such head is left out.
    """
    try:
        head = getattr(task, "head", None) or head_name(model)
    except UnknownName:
        return {}
    kept = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    kept += [module.weight for module in output_layers(model) if isinstance(module, nn.Linear)]
    return {
        name: parameter
        for name, parameter in matrix_weights(model).items()
        if name.rpartition(".")[0] != head and not any(parameter is weight for weight in kept)
    }


def output_layers(model: nn.Module) -> list[nn.Module]:
    """Heads that a model and those inside it name themselves, as Hugging Face's do."""
    found: list[nn.Module] = []
    for module in model.modules():
        try:
            head = getattr(module, "get_output_embeddings", lambda: None)()
        except (AttributeError, NotImplementedError):  # a base model without one
            continue
        if isinstance(head, nn.Module) and not any(head is other for other in found):
            found.append(head)
    return found
