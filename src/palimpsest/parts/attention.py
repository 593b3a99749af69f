"""Query, key and value projections of attention, in networks of any library."""

from __future__ import annotations

from torch import nn

from palimpsest.core.errors import ModelMismatch

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
"""Names of three layers beside each other (transformers, newer and older)."""
FUSED = ("qkv",)
"""Names of one layer for all three (timm)."""
OF_TORCH = (
    "in_proj_weight",
    "in_proj_bias",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "bias_k",
    "bias_v",
)
"""Parameters of torch's own attention."""


def query_key_value(model: nn.Module) -> list[str]:
    """Names of the parameters of all query, key and value projections, in order of definition.

    Found in torch's `MultiheadAttention`, in blocks of transformers (three layers) and of timm (one).

    Raises:
        ModelMismatch: If the model has none.

    Example:
        >>> query_key_value(nn.TransformerEncoderLayer(4, 2))
        ['self_attn.in_proj_weight', 'self_attn.in_proj_bias']
    """
    chosen: set[str] = set()
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            chosen |= {f"{start}{part}" for part in OF_TORCH}
        children = dict(module.named_children())
        for names in (*SEPARATE, *((one,) for one in FUSED)):
            if all(isinstance(children.get(part), nn.Module) for part in names):
                for part in names:
                    chosen |= {f"{start}{part}.{inner}" for inner, _ in children[part].named_parameters()}
    found = [name for name, _ in model.named_parameters() if name in chosen]
    if not found:
        raise ModelMismatch(
            f"{type(model).__name__} has no attention with query, key and value projections: take a vision "
            "transformer (small_vit, published_vit), or train all parameters."
        )
    return found
