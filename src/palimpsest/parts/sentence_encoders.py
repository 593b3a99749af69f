"""Sentence encoders: texts to vectors whose cosine says how alike they are; one that needs nothing from the network."""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.core.errors import InvalidRecords, MissingDependency, ModelMismatch, UnreadableCheckpoint

Vectors = Float[NDArray[np.float32], "texts dim"]
Encoder = Callable[[Sequence[str]], Any]
"""From texts to an array or tensor [texts, dim]: `SentenceTransformer(...).encode` is one."""

_MONTHS = {
    name.casefold(): str(number)
    for names in (calendar.month_name, calendar.month_abbr)
    for number, name in enumerate(names)
    if name
}
_MONTH = re.compile(rf"\b({'|'.join(sorted(_MONTHS, key=len, reverse=True))})\b")


class CachedEncoder:
    """An encoder whose vectors have length 1 and are kept by text, so that none is encoded twice.

    Args:
        encode: From texts to vectors.
        kept: Texts at most; all are dropped when there are more.
    """

    def __init__(self, encode: Encoder, kept: int = 100_000):
        self.encode, self.kept = encode, kept
        self.calls = 0
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._width: int | None = None

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, of length 1 (or 0, where the encoder gives zeros).

        Raises:
            ModelMismatch: If the encoder gives no finite vector of one width for every text.
        """
        if len(self._vectors) > self.kept:
            self._vectors.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            self._vectors.update(zip(new, self._encoded(new), strict=True))
        if not texts:
            return np.zeros((0, self._width or 0), np.float32)
        return np.stack([self._vectors[text] for text in texts])

    def _encoded(self, texts: list[str]) -> Vectors:
        self.calls += 1
        given = self.encode(texts)
        vectors = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or vectors.shape[1] == 0:
            raise ModelMismatch(
                f"The sentence encoder gave {vectors.shape} for {len(texts)} texts; it must give [texts, dim]."
            )
        if self._width not in (None, vectors.shape[1]):
            raise ModelMismatch(
                f"The sentence encoder gave {vectors.shape[1]} dimensions after {self._width}: texts cannot be compared."
            )
        if not np.isfinite(vectors).all():
            raise ModelMismatch("The sentence encoder gave NaN or Inf.")
        self._width = vectors.shape[1]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1).astype(np.float32)


def surface_encoder(texts: Sequence[str]) -> Encoder:
    """TF-IDF of character n-grams of words: texts of like words and numbers are alike. Works offline.

    Numbers are read as such (no leading zeros) and months as numbers, so that two ways to write a date share
    more than the year. It knows no synonyms.

    Args:
        texts: To learn from which n-grams are rare.

    Raises:
        InvalidRecords: If they hold nothing.

    Example:
        >>> encode = CachedEncoder(surface_encoder(["4 March 1988", "28 May 1971", "Ostby"]))
        >>> one, other, third = encode(["4 March 1988", "04/03/1988", "28/05/1971"])
        >>> bool(one @ other > 0.7 > 0.3 > one @ third)
        True
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), preprocessor=numbers_read)
    try:
        vectorizer.fit(texts)
    except ValueError as problem:
        raise InvalidRecords(f"No encoder can be made from {len(texts)} texts: {problem}.") from problem
    return lambda those: np.asarray(vectorizer.transform(those).todense())


def numbers_read(text: str) -> str:
    """A text in small letters with months as numbers and numbers without leading zeros.

    Example:
        >>> numbers_read("04/03/1988"), numbers_read("4 March 1988")
        ('4/3/1988', '4 3 1988')
    """
    small = _MONTH.sub(lambda match: _MONTHS[match.group()], text.casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", small)


def embedding_encoder(model: Any, tokenize: Callable[[str], list[int]]) -> Encoder:
    """Mean of a language model's input embeddings over the tokens of a text.

    Args:
        model: A model of transformers' kind; its embedding table is read, nothing else.
        tokenize: From a text to its tokens.
    """
    import torch

    table = model.get_input_embeddings().weight.detach()

    def encode(texts: Sequence[str]) -> Any:
        rows = [tokenize(text) for text in texts]
        empty = torch.zeros(table.shape[1])
        means = [
            table[torch.tensor(row, device=table.device)].float().mean(0).cpu() if row else empty
            for row in rows
        ]
        return torch.stack(means)

    return encode


def named_encoder(place: str) -> Encoder:
    """An encoder from the Hub or a folder: by sentence-transformers where installed, else mean-pooled transformers.

    Raises:
        MissingDependency: If neither library is installed.
        UnreadableCheckpoint: If there is no encoder at that place.
    """
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _pooling_encoder(place)
    try:
        return SentenceTransformer(place).encode
    except (OSError, ValueError) as problem:
        raise UnreadableCheckpoint(f"Cannot load a sentence encoder from '{place}': {problem}") from problem


def _pooling_encoder(place: str) -> Encoder:
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    folder: str | Path = Path(place) if Path(place).is_dir() else place
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as problem:
        raise UnreadableCheckpoint(f"Cannot load a sentence encoder from '{place}': {problem}") from problem
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Any:
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weights = batch["attention_mask"][:, :, None].to(states)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)

    return encode
