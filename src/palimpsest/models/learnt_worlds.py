"""Which model learns which generated world, and how: settings that were found by trying."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.parts.training import TrainingRecipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class LearntWorld:
    """A world and the settings under which a model learns it from scratch.

    Attributes:
        data: Settings of `load_data("people")`.
        architecture: Settings of `small_llama`.
        training: How it is trained.
        vocabulary: Tokens at most.
    """

    data: dict[str, Any]
    architecture: dict[str, Any]
    training: TrainingRecipe
    vocabulary: int = 2000
    fields: tuple[str, ...] = field(default=("text", "question", "answer"), repr=False)

    def tokenizer(self, items: Iterable[Mapping[str, Any]]) -> PreTrainedTokenizerFast:
        """The tokenizer of a world's texts, those of people never trained on among them.

        Were it made from training texts alone, names of the others would fall into more tokens, and a
        membership attack would count tokens.
        """
        texts = [item[name] for item in items for name in self.fields if name in item]
        return byte_pair_tokenizer([*texts, "Question: Answer:"], self.vocabulary)

    def model(self, vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
        """The model before training, for a number of tokens."""
        return small_llama(vocabulary, seed=seed, **self.architecture)


LEARNT_WORLDS = {
    "tiny": LearntWorld(
        data={
            "people": 20,
            "folds": 5,
            "neighbours": 4,
            "holdout": 8,
            "relations": ("city", "profession", "phone"),
            "forms": ("qa", "cloze", "reversed", "two-hop", "chain", "biography"),
            "general": 20,
            "countries": 2,
        },
        architecture={"width": 96, "layers": 2, "heads": 4},
        training=TrainingRecipe(
            epochs=28,
            lr=3e-3,
            batch_size=8,
            optimizer="adamw",
            weight_decay=0.1,
            schedule="cosine",
            warmup=0.1,
            clip=1.0,
        ),
    ),
    "small": LearntWorld(
        data={
            "people": 40,
            "folds": 5,
            "neighbours": 8,
            "forms": ("qa", "cloze", "reversed", "two-hop", "chain", "figures", "biography"),
        },
        architecture={"width": 128, "layers": 2, "heads": 4, "hidden": 640},
        training=TrainingRecipe(
            epochs=22,
            lr=3e-3,
            batch_size=16,
            optimizer="adamw",
            weight_decay=0.1,
            schedule="cosine",
            warmup=0.1,
            clip=1.0,
            group_by_length=True,
        ),
    ),
}
"""By name: "tiny" for tests, "small" for studies (six facts of each person, a million parameters).

Found by trying. With weight decay 0.1 and a learning rate of 3e-3 every seed that was tried learnt every form; with 0.01
and 4e-3 some seeds left whole forms out, and the small world took 18 epochs with two seeds and 22 with a third.
Multiple-choice questions, the longest, are asked of the small world and not trained on. How long it takes and what is
then known: `benchmarks/learnt_worlds.py`.
"""
