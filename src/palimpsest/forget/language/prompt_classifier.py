"""Does a prompt ask for what is to be forgotten? A linear classifier of n-grams whose weights are tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidRecords

FEATURES = 1 << 14
"""Hashed n-grams."""


class PromptClassifier(nn.Module):
    """Logistic regression on hashed n-grams of letters, with classes weighed by their size.

    The published ones are fine-tuned RoBERTa-base models; this needs no download, and as its weights are buffers
    it is saved with the model that it guards.

    Attributes:
        weight: Of the n-grams, [features].
        bias: One number.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(FEATURES))
        self.register_buffer("bias", torch.zeros(1))

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=FEATURES, norm="l2")

    def fit(self, positive: Sequence[str], negative: Sequence[str], c: float = 100.0) -> PromptClassifier:
        """Learn to tell texts apart.

        Args:
            positive: Prompts about what is to be forgotten.
            negative: Other prompts.
            c: Inverse strength of the regularisation.

        Raises:
            InvalidRecords: If there are no texts of one kind, or a text is of both.
        """
        from sklearn.linear_model import LogisticRegression

        if not positive or not negative:
            raise InvalidRecords("A classifier of prompts needs prompts to forget and others.")
        both = sorted(set(positive) & set(negative))
        if both:
            raise InvalidRecords(f"{len(both)} prompts are to be forgotten and retained at once: {both[:3]}.")
        inputs = self._vectorizer.transform([*positive, *negative])
        labels = [1] * len(positive) + [0] * len(negative)
        found = LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(inputs, labels)
        self.weight.copy_(torch.from_numpy(found.coef_[0]))
        self.bias.fill_(float(found.intercept_[0]))
        return self

    def forward(self, texts: Sequence[str]) -> Float[Tensor, " texts"]:
        """Probability that each text is about what is to be forgotten."""
        inputs = self._vectorizer.transform(list(texts))
        score = inputs @ self.weight.cpu().numpy()
        return torch.sigmoid(torch.from_numpy(score).float() + self.bias.cpu())
