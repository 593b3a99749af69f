"""Attention blocks of a vision transformer, found by structure, and what can be shown to them for a while.

Prefixes and tokens are put in by hooks that live as long as a `with` block; the network itself, its state and
its copies never change. Leave the block before a descent step: what is recorded in it differentiates outside.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import ModelMismatch
from palimpsest.parts.attention import FUSED, SEPARATE

Prefix = tuple[Float[Tensor, "batch length width"], Float[Tensor, "batch length width"]]
"""Further keys and values, as they are after the projections."""
LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Attention:
    """Self-attention of one block.

    Attributes:
        module: Is given hidden states [batch, tokens, width] and gives as many.
        query: Projection; None if one layer (timm's `qkv`) makes all three.
        key: Projection.
        value: Projection.
    """

    module: nn.Module
    query: nn.Linear | None
    key: nn.Linear
    value: nn.Linear

    @property
    def width(self) -> int:
        """Of keys and values, all heads together."""
        return self.key.out_features // (1 if self.query is not None else 3)


@dataclass(frozen=True)
class Blocks:
    """The blocks of an encoder in the order of their running.

    Attributes:
        modules: The blocks.
        attentions: Of each.
        norm: What comes after the last one, if anything does.
    """

    modules: tuple[nn.Module, ...]
    attentions: tuple[Attention, ...]
    norm: nn.Module | None

    @property
    def width(self) -> int:
        """Of the tokens."""
        return self.attentions[0].key.in_features

    def __len__(self) -> int:
        return len(self.modules)


def attention_blocks(model: nn.Module) -> Blocks:
    """The blocks of a vision transformer of transformers, timm, or the user's own of that shape.

    A block is an element of a list of modules and holds one attention with linear layers `query`, `key`,
    `value` (or `q_proj`, `k_proj`, `v_proj`), or one `qkv`, over tokens of one width.

    Raises:
        ModelMismatch: If there are none, or they do not make one list.
    """
    found = {name: made for name, module in model.named_modules() if (made := _attention(module))}
    kind = type(model).__name__
    if not found:
        raise ModelMismatch(
            f"{kind} has no attention with linear layers query, key and value: prompts need a vision transformer "
            "such as small_vit, published_vit or one of transformers or timm."
        )
    modules = dict(model.named_modules())
    places: list[tuple[str, str]] = []
    for name in found:
        parts = name.split(".")
        inner = [n for n in range(len(parts) - 1, -1, -1) if isinstance(modules[".".join(parts[:n])], LISTS)]
        if not inner:
            raise ModelMismatch(
                f"The attention '{name}' of {kind} stands in no list of blocks: prompts need one."
            )
        places.append((".".join(parts[: inner[0]]), parts[inner[0]]))
    lists = {place for place, _ in places}
    if len(lists) > 1 or len(set(places)) < len(places):
        raise ModelMismatch(
            f"The attention blocks of {kind} do not make one list with one attention each, but stand in "
            f"{', '.join(sorted(lists))}: hierarchical and cross-attending networks cannot be prompted."
        )
    widths = {(item.key.in_features, item.width) for item in found.values()}
    if len(widths) > 1:
        raise ModelMismatch(f"The attention blocks of {kind} have different widths: {sorted(widths)}.")
    start = lists.pop()
    blocks = tuple(modules[f"{start}.{child}" if start else child] for _, child in places)
    return Blocks(blocks, tuple(found.values()), _norm_after(model, start))


@contextmanager
def prefixes(blocks: Blocks, shown: Mapping[int, Prefix]) -> Generator[None]:
    """Let the attention of some blocks see further keys and values.

    The input of an attention is lengthened by as many empty rows, whose keys and values are then exchanged for
    the prefix and whose outputs are dropped. Implementations differ in how they reshape keys, and transformers'
    newest takes their number from the input; with as many rows everywhere, eager attention, torch's
    scaled-dot-product attention and timm's fused layer all do the same.

    Args:
        blocks: Of the network.
        shown: Prefix by number of the block.

    Raises:
        ModelMismatch: If an attention is given a mask or rotations of positions, which prefixes do not have.
    """
    with ExitStack() as hooks:
        for number, (keys, values) in shown.items():
            attention, length = blocks.attentions[number], keys.shape[1]
            hooks.callback(
                attention.module.register_forward_pre_hook(
                    partial(_lengthen, length), with_kwargs=True
                ).remove
            )
            parts = ({attention.key: (0, keys), attention.value: (0, values)}
                     if attention.query is not None else {attention.key: (keys.shape[2], torch.cat([keys, values], 2))})  # fmt: skip
            for layer, (first, rows) in parts.items():
                hooks.callback(layer.register_forward_hook(partial(_exchange, first, rows)).remove)
            hooks.callback(attention.module.register_forward_hook(partial(_shorten, length)).remove)
        yield


@contextmanager
def tokens(blocks: Blocks, shown: Float[Tensor, "batch length width"], read: bool = False) -> Generator[None]:
    """Put tokens behind the class token before the first block, without positions.

    Args:
        blocks: Of the network.
        shown: The tokens.
        read: Whether the mean of their outputs takes the place of the class token's, after the last norm.

    Raises:
        ModelMismatch: If they are to be read and no norm follows the last block.
    """
    length = shown.shape[1]

    def insert(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, put = _hidden(args, kwargs)
        return put(torch.cat([hidden[:, :1], shown.to(hidden), hidden[:, 1:]], 1))

    def exchange(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, 1 : 1 + length].mean(1, keepdim=True), output[:, 1:]], 1)

    with ExitStack() as hooks:
        if read:
            if blocks.norm is None:
                raise ModelMismatch("No norm follows the last block: read the class token instead.")
            hooks.callback(blocks.norm.register_forward_hook(exchange).remove)
        hooks.callback(blocks.modules[0].register_forward_pre_hook(insert, with_kwargs=True).remove)
        yield


def _attention(module: nn.Module) -> Attention | None:
    children = dict(module.named_children())
    for names in SEPARATE:
        layers = [children.get(name) for name in names]
        query, key, value = layers
        if isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
            return Attention(module, query, key, value) if key.out_features == value.out_features else None
    fused = children.get(FUSED[0])
    return Attention(module, None, fused, fused) if isinstance(fused, nn.Linear) else None


def _norm_after(model: nn.Module, start: str) -> nn.Module | None:
    """The first norm over features that is defined after the blocks."""
    behind = False
    for name, module in model.named_modules():
        if name == start:
            behind = True
        elif behind and not name.startswith(f"{start}.") and isinstance(module, nn.LayerNorm):
            return module
    return None


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The hidden states of a call, and how to call with others."""
    if args:
        found, put = args[0], lambda new: ((new, *args[1:]), kwargs)
    else:
        name = next((key for key in ("hidden_states", "x") if key in kwargs), "")
        found, put = kwargs.get(name), lambda new: (args, {**kwargs, name: new})
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelMismatch(f"Attention must be given hidden states [batch, tokens, width], not {shape}.")
    return found, put


def _lengthen(length: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, put = _hidden(args, kwargs)
    others = [*args[1:], *(value for value in kwargs.values() if value is not hidden)]
    if any(isinstance(value, Tensor | tuple) for value in others):
        raise ModelMismatch(
            f"{type(module).__name__} is given a mask or positions beside its hidden states: prefixes have none."
        )
    return put(torch.cat([hidden, hidden.new_zeros(len(hidden), length, hidden.shape[2])], 1))


def _exchange(first: int, rows: Tensor, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    """The last rows of a projection, from a column on, are those of the prefix."""
    length = rows.shape[1]
    rows = rows.to(output).expand(len(output), -1, -1)
    last = torch.cat([output[:, -length:, :first], rows], 2)
    return torch.cat([output[:, :-length], last], 1)


def _shorten(length: int, _module: nn.Module, _inputs: object, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0][:, :-length], *output[1:])
    return output[:, :-length]
