"""Norms of every record's own gradient from one backward pass over a batch.

The gradient of a linear layer by one record is sum_t g_t a_t', with inputs a and gradients g of the outputs; its
squared norm is sum_ts (g_t . g_s)(a_t . a_s), so that no gradient of a single record is ever formed ("Efficient
Per-Example Gradient Computations", arXiv 1510.01799, and for sequences "Large Language Models Can Be Strong
Differentially Private Learners", arXiv 2110.05679).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

Call = tuple[Tensor, Tensor, Tensor]
"""Of one module: inputs, outputs' gradient, outputs; records first."""


def sample_gradient_norms(
    model: nn.Module, losses: Callable[[], Float[Tensor, " batch"]], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, "batch parameters"] | None:
    """The 2-norm of the gradient of every record's loss by every parameter tensor, in double precision.

    Linear layers, embeddings (also tied to the head) and modules whose parameters act on each record alone, such
    as norms, can be taken apart in this way.

    Args:
        model: In evaluation mode; a record's loss must depend on no other record.
        losses: A forward pass that gives every record's loss.
        parameters: Tensors to differentiate by; 0 for those that the losses do not reach.

    Returns:
        None if the model is built so that it cannot be done; differentiate record by record then.
    """
    wanted = {id(parameter) for parameter in parameters}
    owned = {
        module: [
            name for name, parameter in module.named_parameters(recurse=False) if id(parameter) in wanted
        ]
        for module in model.modules()
    }
    owned = {module: names for module, names in owned.items() if names}
    if {id(getattr(module, name)) for module, names in owned.items() for name in names} != wanted:
        return None
    calls = _calls(owned, losses)
    if calls is None:
        return None
    size = next(iter(calls.values()))[1].shape[0]
    found: list[Tensor] = []
    for parameter in parameters:
        owners = [
            (module, name)
            for module, names in owned.items()
            for name in names
            if getattr(module, name) is parameter and module in calls
        ]
        squares = _squares(owners, calls) if owners else parameter.new_zeros(size, dtype=torch.float64)
        if squares is None:
            return None
        found.append(squares.clamp(min=0).sqrt())
    return torch.stack(found, 1)


def _calls(
    owned: dict[nn.Module, list[str]], losses: Callable[[], Float[Tensor, " batch"]]
) -> dict[nn.Module, Call] | None:
    """What every module was given and the gradient of what it gave; None if one cannot be taken apart."""
    seen: dict[nn.Module, tuple[Any, Any]] = {}
    twice: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in seen or len(args) + len(kwargs) != 1:
            twice.append(module)
        seen[module] = (*args, *kwargs.values(), None)[0], output

    with ExitStack() as hooks, torch.enable_grad():
        for module in owned:
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        whole = losses()
        total = whole.sum()
    size = len(whole)
    if twice or not all(
        isinstance(part, Tensor) and part.dim() and len(part) == size
        for pair in seen.values()
        for part in pair
    ):
        return None
    outputs = [output for _, output in seen.values()]
    gradients = torch.autograd.grad(total, outputs, allow_unused=True, materialize_grads=True)
    return {
        module: (given.detach(), gradient.detach(), output.detach())
        for (module, (given, output)), gradient in zip(seen.items(), gradients, strict=True)
    }


def _squares(
    owners: Sequence[tuple[nn.Module, str]], calls: dict[nn.Module, Call]
) -> Float[Tensor, " batch"] | None:
    """Squared norms of the gradients by one tensor."""
    if len(owners) == 1:
        module, name = owners[0]
        given, gradient, _ = calls[module]
        if isinstance(module, nn.Linear):
            rows = _rows(gradient)
            return rows.sum(1).square().sum(1) if name == "bias" else _product(_rows(given), rows)
        if isinstance(module, nn.Embedding):
            return _of_embedding(module, given, gradient)
        return _by_itself(module, name, given, gradient)
    kinds = sorted(type(module).__name__ for module, _ in owners)
    if kinds != ["Embedding", "Linear"]:
        return None
    (embedding, _), (head, _) = sorted(owners, key=lambda owner: type(owner[0]).__name__)
    assert isinstance(embedding, nn.Embedding)
    ids, outer, _ = calls[embedding]
    inputs, logits = _rows(calls[head][0]), _rows(calls[head][1])
    kept = _kept(embedding, ids)
    # <e_id g', d h'> = d[id] (g . h), for every token that is read and every one that is answered
    at_ids = logits.gather(2, ids.flatten(1)[:, None].expand(-1, logits.shape[1], -1)) * kept[:, None]
    mixed = (at_ids * (inputs @ _rows(outer).transpose(1, 2))).sum((1, 2))
    return _product(inputs, logits) + _of_embedding(embedding, ids, outer) + 2 * mixed


def _rows(values: Tensor) -> Float[Tensor, "batch rows dim"]:
    """Records, their positions, and the last dimension."""
    return values.double().reshape(len(values), -1, values.shape[-1])


def _product(inputs: Tensor, gradients: Tensor) -> Float[Tensor, " batch"]:
    """Squared norm of sum_t g_t a_t' of every record, in the cheaper of two ways."""
    rows, outer, inner = gradients.shape[1], gradients.shape[2], inputs.shape[2]
    if rows * (outer + inner) > outer * inner:
        return (gradients.transpose(1, 2) @ inputs).square().sum((1, 2))
    return ((gradients @ gradients.transpose(1, 2)) * (inputs @ inputs.transpose(1, 2))).sum((1, 2))


def _kept(module: nn.Embedding, ids: Tensor) -> Float[Tensor, "batch rows"]:
    """1 for tokens whose row of the embedding has a gradient, 0 for padding."""
    ids = ids.flatten(1)
    return (
        torch.ones_like(ids, dtype=torch.float64)
        if module.padding_idx is None
        else (ids != module.padding_idx).double()
    )


def _of_embedding(module: nn.Embedding, ids: Tensor, gradient: Tensor) -> Float[Tensor, " batch"]:
    """Rows of equal tokens add up."""
    rows = _rows(gradient) * _kept(module, ids)[:, :, None]
    ids = ids.flatten(1)
    same = (ids[:, :, None] == ids[:, None, :]).double()
    return (same * (rows @ rows.transpose(1, 2))).sum((1, 2))


def _by_itself(module: nn.Module, name: str, given: Tensor, gradient: Tensor) -> Float[Tensor, " batch"]:
    """By a parameter of any other module, which is differentiated for every record alone."""
    value = getattr(module, name).detach()

    def one(inputs: Tensor, outer: Tensor) -> Tensor:
        pull = vjp(lambda parameter: functional_call(module, {name: parameter}, (inputs[None],))[0], value)[1]
        return pull(outer)[0]

    return vmap(one)(given, gradient).double().flatten(1).square().sum(1)
