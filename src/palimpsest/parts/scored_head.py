"""The head of a language model where something is scored, and nowhere else.

A vocabulary is large: the logits of prompts and padding, which no loss looks at, often take more time and memory than
everything before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Bool
from torch import Tensor, nn

from palimpsest.parts.parameters import unwrapped


@contextmanager
def head_at(model: nn.Module, positions: Bool[Tensor, "batch tokens"]) -> Iterator[None]:
    """While this lasts, a Hugging Face model gives logits [chosen, vocabulary] instead of [batch, tokens, vocabulary].

    In the order of rows and positions. Whatever a model does with its logits after the head (scaling, soft caps) acts
    on each of them alone and goes on to hold. A model that does not say what its head is, one that answers with
    more than its own logits (`Wrapped`), or whose head sees other positions (virtual tokens before the prompt) is
    left as it is: callers tell by the number of dimensions.

    Args:
        model: Also with adapters, or inside data parallel.
        positions: Which inputs of the head to keep.

    Example:
        >>> import torch
        >>> from palimpsest.models.small_llama import small_llama
        >>> model, ids = small_llama(vocabulary=10, width=8, heads=1), torch.tensor([[1, 4, 5], [1, 6, 2]])
        >>> with head_at(model, ids > 4):
        ...     model(input_ids=ids).logits.shape
        torch.Size([2, 10])
    """
    head = _head(unwrapped(model))
    if head is None:
        yield
        return

    def choose(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden, *rest = inputs
        return (hidden[positions], *rest) if hidden.shape[:-1] == positions.shape else None

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _head(model: nn.Module) -> nn.Module | None:
    """The output layer of a model whose decoder leads to it and to nothing else."""
    if not hasattr(model, "get_decoder"):
        return None
    return getattr(model, "get_output_embeddings", lambda: None)()
