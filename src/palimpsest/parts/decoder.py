"""The anatomy of a decoder-only transformer, found by its modules: embedding, blocks, MLP and attention in each."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.parameters import unwrapped

BlockPart = Literal["mlp", "attention", "all"]

_PARTS: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "attention": ("self_attn", "attn", "attention", "self_attention"),
}


@dataclass(frozen=True)
class Decoder:
    """Names of modules of a decoder-only transformer.

    Attributes:
        embedding: The token embedding.
        stack: The list that holds the blocks.
        blocks: The blocks, in order of depth.
    """

    embedding: str
    stack: str
    blocks: tuple[str, ...]


def decoder_of(model: nn.Module) -> Decoder:
    """The anatomy of a model.

    The blocks are the longest list of modules of one kind that is not within another (as experts are); the
    embedding is the one that the model names (`get_input_embeddings`), or else its first.

    Raises:
        ModelMismatch: If there is no list of blocks, or no embedding.
    """
    modules = dict(unwrapped(model).named_modules())
    stacks = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(each) for each in module}) == 1
    }
    if not stacks:
        raise ModelMismatch("The model holds no list of blocks: it is no transformer of known naming.")
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    stack = max(outer, key=lambda name: len(stacks[name]))
    named = getattr(unwrapped(model), "get_input_embeddings", lambda: None)()
    embeddings = [
        name
        for name, module in modules.items()
        if (module is named if named is not None else isinstance(module, nn.Embedding))
    ]
    if not embeddings:
        raise ModelMismatch("The model holds no token embedding.")
    return Decoder(embeddings[0], stack, tuple(f"{stack}.{i}" for i in range(len(stacks[stack]))))


def part_of(model: nn.Module, block: str, part: str) -> str:
    """Name of the MLP or the attention of a block.

    Raises:
        InvalidHyperparameter: If the part is neither "mlp" nor "attention".
        ModelMismatch: If the block names it otherwise than the usual models do.
    """
    if part not in _PARTS:
        raise InvalidHyperparameter(f"A part of a block is 'mlp' or 'attention', not {part!r}.")
    children = dict(unwrapped(model).get_submodule(block).named_children())
    for name in _PARTS[part]:
        if name in children:
            return f"{block}.{name}"
    raise ModelMismatch(f"Block '{block}' has no {part}: it is made of {', '.join(children) or 'nothing'}.")


def block_parameters(model: nn.Module, layers: Collection[int], part: BlockPart = "mlp") -> list[str]:
    """Names of the parameters of some blocks: those of the MLP, of the attention, or all of them.

    Args:
        model: A decoder.
        layers: Indices of blocks from 0.
        part: "mlp", "attention" or "all" (norms included).

    Raises:
        InvalidHyperparameter: If an index lies outside the stack, the part is unknown or nothing is chosen.
    """
    blocks = decoder_of(model).blocks
    outside = sorted(layer for layer in layers if not 0 <= layer < len(blocks))
    if outside or not layers:
        raise InvalidHyperparameter(f"Layers {sorted(layers)}: choose one or more of 0 to {len(blocks) - 1}.")
    if part not in (*_PARTS, "all"):
        raise InvalidHyperparameter(f"part must be 'mlp', 'attention' or 'all', not {part!r}.")
    roots = [blocks[i] if part == "all" else part_of(model, blocks[i], part) for i in sorted(layers)]
    found = [
        name
        for name, _ in unwrapped(model).named_parameters()
        if any(name.startswith(f"{root}.") for root in roots)
    ]
    if not found:
        raise InvalidHyperparameter(
            f"{part} of layers {sorted(layers)} holds no parameters: nothing would move."
        )
    return found


def truncated(model: nn.Module, layers: int) -> nn.Module:
    """A copy of a decoder with only its first blocks: embedding, norms and head are copied too.

    The blocks that are left out are never copied. Nothing is shared with the model: an embedding that is
    tied to the head is tied in the copy to the copy's.

    Args:
        model: A decoder.
        layers: Number of blocks that stay, from 1 to all.

    Raises:
        InvalidHyperparameter: If the stack has not as many.
    """
    model = unwrapped(model)
    decoder = decoder_of(model)
    check_range("layers", layers, 1, len(decoder.blocks))
    stack = model.get_submodule(decoder.stack)
    copies: dict[int, Any] = {}
    short = nn.ModuleList(copy.deepcopy(block, copies) for block in list(stack.children())[:layers])
    short.training = stack.training
    copies[id(stack)] = short
    copied = copy.deepcopy(model, copies)
    config = getattr(copied, "config", None)
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if hasattr(config, key):
            setattr(config, key, layers)
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = kinds[:layers]  # type: ignore[union-attr]
    return copied
