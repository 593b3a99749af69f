"""The stack of blocks of a transformer: where it is, what its parts are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.parts.parameters import unwrapped

ATTENTION = ("self_attn", "attention", "attn", "self_attention")
MLP = ("mlp", "feed_forward", "ffn")
DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "ff_out")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


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
        """Name of a part of a block: "mlp", "self_attn", "down" (last projection of the MLP) or "all".

        Raises:
            InvalidHyperparameter: For another kind, or a block without it.
        """
        block = self.block(number)
        if kind == "all":
            return block
        if kind == "down":
            mlp = self.part(number, "mlp")
            return f"{mlp}.{_one_of(self.blocks[number].get_submodule(mlp[len(block) + 1 :]), DOWN, kind)}"
        known = {"mlp": MLP, "self_attn": ATTENTION}
        if kind not in known:
            raise InvalidHyperparameter(f"A part of a block is mlp, self_attn, down or all, not {kind!r}.")
        return f"{block}.{_one_of(self.blocks[number], known[kind], kind)}"


def stack_of(model: nn.Module) -> Stack:
    """The stack of a model: its longest list of modules of one class.

    Raises:
        ModelMismatch: If there is none.
    """
    lists = [
        (name, part) for name, part in unwrapped(model).named_modules() if isinstance(part, nn.ModuleList)
    ]
    stacks = [(name, part) for name, part in lists if len({type(item) for item in part}) == 1]
    best = max(stacks, key=lambda item: len(item[1]), default=None)
    if best is None:
        raise ModelMismatch("The model has no list of equal blocks: it is no stack of transformer blocks.")
    return Stack(best[0], tuple(best[1]))


def final_norm(model: nn.Module) -> nn.Module:
    """The normalisation between the last block and the head.

    Raises:
        ModelMismatch: If it has none beside its stack.
    """
    inner = unwrapped(model)
    stack = stack_of(inner)
    parent = inner.get_submodule(stack.name.rpartition(".")[0])
    for name in FINAL_NORM:
        found = getattr(parent, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ModelMismatch(f"No final normalisation ({', '.join(FINAL_NORM)}) lies beside '{stack.name}'.")


def parts_of(model: nn.Module, layers: Sequence[int] | None, kind: str) -> list[str]:
    """Names of the parts of several blocks (of all, for None)."""
    stack = stack_of(model)
    return [stack.part(number, kind) for number in (range(len(stack)) if layers is None else layers)]


def _one_of(module: nn.Module, names: Sequence[str], kind: str) -> str:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return name
    children = ", ".join(name for name, _ in module.named_children())
    raise InvalidHyperparameter(f"No {kind} among the parts of {type(module).__name__}: {children}.")
