"""The anatomy of a decoder-only transformer, found by its modules: embedding, blocks, MLP and attention in each."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.parameters import unwrapped

BlockPart = Literal["mlp", "attention", "all"]

MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "ff_out")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
PARTS = {"mlp": MLP, "attention": ATTENTION, "self_attn": ATTENTION}
"""Parts of a block and the names that usual models give them."""


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, in order.

    Attributes:
        name: Of the list that holds them ("model.layers").
        blocks: The modules.
    """

    name: str
    blocks: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, number: int) -> str:
        """Name of a block.

        Raises:
            InvalidHyperparameter: If there is none of this number.
        """
        if not 0 <= number < len(self.blocks):
            raise InvalidHyperparameter(f"The model has blocks 0 to {len(self.blocks) - 1}, not {number}.")
        return f"{self.name}.{number}"

    def part(self, number: int, kind: str) -> str:
        """Name of a part of a block: "mlp", "attention" (or "self_attn"), "down" or "all".

        "down" is the last projection of the MLP, "all" the block itself.

        Raises:
            InvalidHyperparameter: For another kind.
            ModelMismatch: If the block names it otherwise than the usual models do.
        """
        block = self.block(number)
        if kind == "all":
            return block
        if kind == "down":
            mlp = self.part(number, "mlp")
            return (
                f"{mlp}.{_one_of(self.blocks[number].get_submodule(mlp[len(block) + 1 :]), DOWN, mlp, kind)}"
            )
        if kind not in PARTS:
            raise InvalidHyperparameter(
                f"A part of a block is 'mlp', 'attention' ('self_attn'), 'down' or 'all', not {kind!r}."
            )
        return f"{block}.{_one_of(self.blocks[number], PARTS[kind], block, kind)}"


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


def stack_of(model: nn.Module) -> Stack:
    """The stack of a model: the longest list of modules of one class that is not within another (as experts are).

    Raises:
        ModelMismatch: If there is none.
    """
    stacks = {
        name: tuple(module)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(each) for each in module}) == 1
    }
    if not stacks:
        raise ModelMismatch("The model holds no list of blocks: it is no transformer of known naming.")
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    name = max(outer, key=lambda each: len(stacks[each]))
    return Stack(name, stacks[name])


def decoder_of(model: nn.Module) -> Decoder:
    """The names of embedding and blocks.

    The embedding is the one that the model names (`get_input_embeddings`), or else its first.

    Raises:
        ModelMismatch: If there is no list of blocks, or no embedding.
    """
    stack, inner = stack_of(model), unwrapped(model)
    named = getattr(inner, "get_input_embeddings", lambda: None)()
    embeddings = [
        name
        for name, module in inner.named_modules()
        if (module is named if named is not None else isinstance(module, nn.Embedding))
    ]
    if not embeddings:
        raise ModelMismatch("The model holds no token embedding.")
    return Decoder(embeddings[0], stack.name, tuple(stack.block(at) for at in range(len(stack))))


def final_norm(model: nn.Module) -> nn.Module:
    """The normalisation between the last block and the head.

    Raises:
        ModelMismatch: If it has none beside its stack.
    """
    inner, stack = unwrapped(model), stack_of(model)
    parent = inner.get_submodule(stack.name.rpartition(".")[0])
    for name in FINAL_NORM:
        found = getattr(parent, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ModelMismatch(f"No final normalisation ({', '.join(FINAL_NORM)}) lies beside '{stack.name}'.")


def part_of(model: nn.Module, block: str, part: str) -> str:
    """Name of the MLP or the attention of a block, given by its name.

    Raises:
        InvalidHyperparameter: If the part is neither "mlp" nor "attention".
        ModelMismatch: If the block names it otherwise than the usual models do.
    """
    if part not in PARTS:
        raise InvalidHyperparameter(f"A part of a block is 'mlp' or 'attention', not {part!r}.")
    return f"{block}.{_one_of(unwrapped(model).get_submodule(block), PARTS[part], block, part)}"


def parts_of(model: nn.Module, layers: Sequence[int] | None, kind: str) -> list[str]:
    """Names of the parts (see `Stack.part`) of several blocks, of all for None."""
    stack = stack_of(model)
    return [stack.part(number, kind) for number in (range(len(stack)) if layers is None else layers)]


def block_parameters(model: nn.Module, layers: Collection[int], part: BlockPart = "mlp") -> list[str]:
    """Names of the parameters of some blocks: those of the MLP, of the attention, or all of them.

    Args:
        model: A decoder.
        layers: Indices of blocks from 0.
        part: "mlp", "attention" or "all" (norms included).

    Raises:
        InvalidHyperparameter: If an index lies outside the stack, the part is unknown or nothing is chosen.
    """
    stack = stack_of(model)
    outside = sorted(layer for layer in layers if not 0 <= layer < len(stack))
    if outside or not layers:
        raise InvalidHyperparameter(f"Layers {sorted(layers)}: choose one or more of 0 to {len(stack) - 1}.")
    if part not in (*PARTS, "all"):
        raise InvalidHyperparameter(f"part must be 'mlp', 'attention' or 'all', not {part!r}.")
    roots = tuple(f"{name}." for name in parts_of(model, sorted(layers), part))
    found = [name for name, _ in unwrapped(model).named_parameters() if name.startswith(roots)]
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
    blocks = stack_of(model)
    check_range("layers", layers, 1, len(blocks))
    stack = model.get_submodule(blocks.name)
    copies: dict[int, Any] = {}
    short = nn.ModuleList(copy.deepcopy(block, copies) for block in blocks.blocks[:layers])
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


def _one_of(module: nn.Module, names: Sequence[str], owner: str, kind: str) -> str:
    """The child that goes by one of the names."""
    children = dict(module.named_children())
    for name in names:
        if name in children:
            return name
    raise ModelMismatch(f"'{owner}' has no {kind}: it is made of {', '.join(children) or 'nothing'}.")
