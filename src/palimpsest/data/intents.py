"""A thousand real requests to an assistant in ten intents: a slice of CLINC150, as token ids."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.data import TensorDataset

from palimpsest.core.records import Records
from palimpsest.data.registry import dataset

FILE = Path(__file__).with_name("intents.yaml")
PAD, MASK, UNKNOWN = 0, 1, 2
"""Ids of padding, of a word that was masked, and of a word that is not in the vocabulary."""
LENGTH = 20
"""Words of a text that are kept; longer ones (1 in 100) are cut."""
LEAST = 2
"""A word of the vocabulary occurs in at least so many texts."""
CONCEPTS = {
    "money": "money dollars dollar pesos yen euros pounds rubles cash bank account accounts checking savings",
    "flight": "flight flights fly airline airport plane dl123 roundtrip boarding board",
    "clock": "alarm timer am pm minutes minute hour hours noon o'clock seconds",
    "languages": "french spanish italian german chinese english russian japanese hello",
    "words": "spell spelling spelled word letters say translate",
    "sky": "weather forecast rain snow temperature hot cold sunny",
}
"""Concepts by words of which a text must hold one. The lists are ours, not part of CLINC150."""


@dataset("intents")
def intents(length: int = LENGTH) -> Records:
    """Token ids of 1,000 texts, input [length], label 0 to 9, columns "text", "intent", one per concept.

    Args:
        length: Words per text; shorter ones are padded at the end.

    Source: CLINC150 (Larson et al., EMNLP 2019; CC BY 3.0), the training texts of ten of its intents. A
    column of `CONCEPTS` is true where a text holds one of the concept's words.
    """
    texts = _texts()
    spoken = [(intent, text) for intent, lines in texts.items() for text in lines]
    ids = torch.from_numpy(np.stack([encode(text, length) for _, text in spoken]))
    labels = torch.tensor([list(texts).index(intent) for intent, _ in spoken])
    held = [set(words_of(text)) for _, text in spoken]
    shown = {
        name: [not held_.isdisjoint(words.split()) for held_ in held] for name, words in CONCEPTS.items()
    }
    return Records(
        TensorDataset(ids, labels),
        ids=[f"{intent}-{number % 100:02d}" for number, (intent, _) in enumerate(spoken)],
        columns={
            "text": np.array([text for _, text in spoken], dtype=object),
            "intent": np.array([intent for intent, _ in spoken], dtype=object),
            **shown,
        },
    )


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[a-z0-9']+", text.lower())


@cache
def vocabulary() -> tuple[str, ...]:
    """Words by id: the three signs, then those of at least `LEAST` texts, in alphabetical order."""
    counts = Counter(word for lines in _texts().values() for text in lines for word in set(words_of(text)))
    return ("<pad>", "***", "<unknown>", *sorted(word for word, n in counts.items() if n >= LEAST))


def encode(text: str, length: int = LENGTH) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ids of a text's first words, padded at the end, [length]."""
    known = {word: index for index, word in enumerate(vocabulary())}
    ids = [known.get(word, UNKNOWN) for word in words_of(text)[:length]]
    return np.array(ids + [PAD] * (length - len(ids)), dtype=np.int64)


def decode(ids: list[int]) -> str:
    """Words of ids, without padding."""
    return " ".join(vocabulary()[index] for index in ids if index != PAD)


@cache
def _texts() -> dict[str, list[str]]:
    """Texts by intent, in the order of the file."""
    stored = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {intent: block.splitlines() for intent, block in stored.items()}
