"""A Llama of 1 to 10 million parameters with random weights, for worlds that are learnt from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency
from palimpsest.core.modes import seeded
from palimpsest.models.registry import model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def small_llama(
    vocabulary: int,
    width: int = 128,
    layers: int = 3,
    heads: int = 4,
    hidden: int | None = None,
    length: int = 256,
    tied: bool = False,
    pad: int = 0,
    begin: int = 1,
    end: int = 2,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A freshly initialised Llama.

    Args:
        vocabulary: Number of tokens.
        width: Of the residual stream.
        layers: Decoder layers.
        heads: Of the attention; they divide the width into even parts.
        hidden: Units of every MLP; three times the width by default.
        length: Longest sequence.
        tied: Whether input and output embeddings are one matrix.
        pad: Token id of padding.
        begin: Token id at the beginning.
        end: Token id at the end.
        seed: Of the weights.

    Raises:
        MissingDependency: If transformers is not installed.
        InvalidHyperparameter: If a size is not positive, or the heads do not divide the width.
    """
    hidden = 3 * width if hidden is None else hidden
    sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "hidden": hidden}
    for name, size in {**sizes, "length": length}.items():
        if size < 1:
            raise InvalidHyperparameter(f"{name} must be at least 1, not {size}.")
    if width % (2 * heads):
        raise InvalidHyperparameter(
            f"A width of {width} does not divide into {heads} heads of even size: rotary positions turn pairs."
        )
    if not all(0 <= token < vocabulary for token in (pad, begin, end)):
        raise InvalidHyperparameter(
            f"The tokens pad {pad}, begin {begin} and end {end} must lie in a vocabulary of {vocabulary}."
        )
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
        pad_token_id=pad,
        bos_token_id=begin,
        eos_token_id=end,
    )
    with seeded(seed):
        return LlamaForCausalLM(config).eval()


@model("small_llama")
def for_task(input_shape: tuple[int, ...], classes: int, **settings: Any) -> LlamaForCausalLM:
    """The model for a task of language: `classes` is the size of its vocabulary.

    Args:
        input_shape: Not used; texts have no shape.
        classes: Number of tokens.
        **settings: Of `small_llama`.
    """
    return small_llama(classes, **settings)
