"""Small classifiers of token sequences, from scratch, for tests and replications; users bring their own."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import ModelMismatch
from palimpsest.models.registry import model


@model("text_transformer")
class TextTransformer(nn.Module):
    """Token and position embeddings, encoder layers, the mean over tokens, and a linear head.

    Args:
        input_shape: (tokens,): the longest sequence.
        classes: Number of logits.
        vocabulary: Number of token ids; 0 is padding.
        width: Of the embeddings.
        depth: Encoder layers; 0 leaves a bag of embeddings.
        heads: Of the attention.
        dropout: Inside the layers and before the head.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        vocabulary: int = 1000,
        width: int = 32,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        if len(input_shape) != 1:
            raise ModelMismatch(f"A text classifier takes token ids of shape (tokens,), not {input_shape}.")
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(input_shape[0], width)) if depth else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        padding = ids == 0
        seen = padding & ~padding.all(1, keepdim=True)  # a text of nothing but padding attends to all of it
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=seen)
        weight = (~seen).to(x)[..., None]
        pooled = (x * weight).sum(1) / weight.sum(1)
        return self.head(self.dropout(F.relu(self.hidden(pooled))))
