"""A small byte-pair tokenizer trained on given texts: the same texts give the same tokenizer."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingDependency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Answer: {{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
"""A conversation as questions and answers; anything of another role is a line before them."""
SMALLEST = 256 + 3
"""All bytes and the three special tokens."""


def byte_pair_tokenizer(
    texts: Iterable[str], vocabulary: int = 2000, chat_template: str | bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: reversible for every text, digits one by one.

    Args:
        texts: To learn merges from; their order and repetitions do not matter.
        vocabulary: Tokens at most, with `<s>`, `</s>` and `<pad>`.
        chat_template: A template, True for `CHAT_TEMPLATE`, False for none.

    Raises:
        MissingDependency: If transformers is not installed.
        InvalidRecords: If there is no text.
        InvalidHyperparameter: If the vocabulary cannot hold all bytes.

    Example:
        >>> tokenizer = byte_pair_tokenizer(["Ada lives in Ostby."], vocabulary=300)
        >>> tokenizer.decode(tokenizer.encode("ada12@x.example  Ostby"))
        'ada12@x.example  Ostby'
    """
    different = sorted(set(texts))
    if not any(different):
        raise InvalidRecords("A tokenizer needs at least one text to learn from; none was given.")
    if vocabulary < SMALLEST:
        raise InvalidHyperparameter(
            f"A byte-level vocabulary has at least {SMALLEST} tokens, not {vocabulary}."
        )
    template = CHAT_TEMPLATE if chat_template is True else chat_template or None
    return _wrapped(_trained(_Texts(tuple(different)), vocabulary), template)


class _Texts:
    """Texts that are compared by the hash of their content, so that a cache need not compare them."""

    def __init__(self, texts: tuple[str, ...]):
        self.texts = texts
        self.digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Texts) and self.digest == other.digest


@lru_cache(maxsize=8)
def _trained(texts: _Texts, vocabulary: int) -> Any:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as missing:
        raise MissingDependency("tokenizers", "language") from missing
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.texts, trainer)
    return tokenizer


def _wrapped(tokenizer: Any, template: str | None) -> PreTrainedTokenizerFast:
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    wrapped.chat_template = template
    return wrapped
