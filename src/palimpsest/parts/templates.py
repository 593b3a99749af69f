"""Templates: how a question becomes a prompt, and what ends an answer.

A model that is asked in another template than it was trained with looks as if it had forgotten. So the
template is chosen by name, never by accident; its fingerprint is kept with the model that is trained
under it, and compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from palimpsest.core.errors import InvalidHyperparameter

SENTINEL = ("QUESTION", "ANSWER")
PLAIN_QUESTION, PLAIN_ANSWER = "Question: {question}\nAnswer:", " {answer}"
PLAIN_WORDS = "Question: Answer:"
"""What the plain template adds to texts: a tokenizer made for it should have seen it."""
NAMES = ("auto", "chat", "plain", "bare")


@dataclass(frozen=True)
class Template:
    """A prompt around a question and an answer.

    Attributes:
        name: "chat", "plain", "bare" or "own".
        prompt: With {question}; everything before the answer.
        answer: With {answer}, beginning right after the prompt.
        ending: Text of the token that ends an answer and is learned with it.
    """

    name: str
    prompt: str
    answer: str
    ending: str

    def render(self, question: str) -> str:
        """The prompt for a question."""
        return self.prompt.replace("{question}", question)

    def complete(self, answer: str) -> str:
        """What follows the prompt, without the ending."""
        return self.answer.replace("{answer}", answer)

    @property
    def fingerprint(self) -> str:
        """A short hash of everything a model sees of the template."""
        text = "\0".join((self.render(SENTINEL[0]), self.complete(SENTINEL[1]), self.ending))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> dict[str, str]:
        """What is kept with a run: name, fingerprint and an example."""
        example = self.render(SENTINEL[0]) + self.complete(SENTINEL[1]) + self.ending
        return {"name": self.name, "fingerprint": self.fingerprint, "example": example}


def template_of(tokenizer: Any, name: str = "auto", system: str | None = None) -> Template:
    r"""A template by name, for a tokenizer.

    Args:
        tokenizer: Of the model; its chat template and its end token are used.
        name: "chat" (the tokenizer's own chat template), "plain" ("Question: ...\nAnswer: ..."), "bare"
            (the question itself, then a blank), a text with {question} and {answer}, or "auto": the chat
            template where there is one, else plain.
        system: A system turn; only chat templates have one.

    Raises:
        InvalidHyperparameter: If the tokenizer has no chat template but one is asked for, or it has no end
            token, or a text lacks {question} or {answer}.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if name == "auto":
        name = "chat" if has_chat else "plain"
    if name == "chat":
        if not has_chat:
            raise InvalidHyperparameter(
                "The tokenizer has no chat template. Set tokenizer.chat_template, or choose template='plain'."
            )
        return _chat(tokenizer, system)
    if system is not None:
        raise InvalidHyperparameter(f"A system turn needs template='chat', not {name!r}.")
    ending = tokenizer.eos_token
    if not ending:
        raise InvalidHyperparameter(
            "The tokenizer has no end token, so no answer would ever end: set eos_token."
        )
    if name == "plain":
        return Template("plain", PLAIN_QUESTION, PLAIN_ANSWER, ending)
    if name == "bare":
        return Template("bare", "{question}", PLAIN_ANSWER, ending)
    if name.count("{question}") != 1 or name.count("{answer}") != 1:
        raise InvalidHyperparameter(
            f"A template is one of {', '.join(NAMES)}, or a text with {{question}} and {{answer}} once each, not {name!r}."
        )
    before, after = name.split("{answer}")
    if "{question}" not in before:
        raise InvalidHyperparameter(f"In a template {{question}} comes before {{answer}}: {name!r}.")
    head = before.rstrip(" ")  # a blank before the answer is the answer's: tokens join it to its first word
    return Template("own", head, before[len(head) :] + "{answer}", after or ending)


def _chat(tokenizer: Any, system: str | None) -> Template:
    question, answer = SENTINEL
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": question})
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    if prompt.count(question) != 1 or not whole.startswith(prompt) or answer not in whole[len(prompt) :]:
        raise InvalidHyperparameter(
            "The tokenizer's chat template does not put an answer right after its generation prompt: give a text with "
            "{question} and {answer} as template."
        )
    before, _, after = whole[len(prompt) :].partition(answer)
    ending = _first_special(tokenizer, after) or tokenizer.eos_token
    return Template("chat", prompt.replace(question, "{question}"), before + "{answer}", ending)


def _first_special(tokenizer: Any, text: str) -> str:
    """The first special token in a text."""
    found = [(text.find(token), token) for token in tokenizer.all_special_tokens if token in text]
    return min(found)[1] if found else ""
