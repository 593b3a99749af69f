"""A chat model behind an HTTP endpoint of OpenAI's kind: asked with patience, answers kept as they come.

Only the standard library is used. What was answered is kept in a file where one is named, so that an endpoint
that falls silent half-way costs nothing but the questions that are still open.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from palimpsest.core.errors import InvalidHyperparameter, PalimpsestError

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP states after which it is worth asking again."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts at most."""


class EndpointFailed(PalimpsestError):
    """An endpoint that does not answer, refuses, or answers something else than a chat completion."""


@dataclass(frozen=True)
class ChatEndpoint:
    """Where and how to ask.

    Attributes:
        url: Up to and without "/chat/completions", such as "http://localhost:8000/v1".
        model: Name that the endpoint knows the model by.
        key_variable: Environment variable that holds the key; empty for none. The key itself is never kept.
        timeout: Seconds to wait for one answer.
        attempts: Times that a question is asked at most.
        backoff: Seconds to wait after the first failure; twice as long after each further one.
        max_tokens: Of an answer.
        temperature: 0 asks for the likeliest answer.
    """

    url: str
    model: str
    key_variable: str = ""
    timeout: float = 60.0
    attempts: int = 4
    backoff: float = 1.0
    max_tokens: int = 256
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InvalidHyperparameter(f"An endpoint begins with http:// or https://, not {self.url!r}.")
        if not self.model:
            raise InvalidHyperparameter(f"Name the model that {self.url} is to answer with.")
        if self.attempts < 1 or not self.timeout > 0 or self.backoff < 0 or self.max_tokens < 1:
            raise InvalidHyperparameter(
                f"attempts and max_tokens must be at least 1, timeout above 0 and backoff not negative: {self}."
            )
        if self.key_variable and not os.environ.get(self.key_variable):
            raise InvalidHyperparameter(f"The environment variable {self.key_variable!r} holds no key.")

    def complete(self, prompt: str) -> str:
        """The answer to one prompt.

        Raises:
            EndpointFailed: After the last attempt, or at once where asking again is of no use.
        """
        problem = ""
        for attempt in range(self.attempts):
            try:
                return _content(self._post(prompt))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                wanted = error.headers.get("Retry-After") if error.headers else None
                error.close()
                if error.code not in BUSY:
                    raise EndpointFailed(
                        f"{self.url} refuses the model {self.model!r}: {problem}. Check url, model and key."
                    ) from error
            except (OSError, HTTPException) as error:  # timeouts, refused and broken connections
                problem, wanted = str(getattr(error, "reason", error)) or type(error).__name__, None
            if attempt + 1 < self.attempts:
                time.sleep(_wait(self.backoff * 2**attempt, wanted))
        raise EndpointFailed(
            f"{self.url} gave no answer in {self.attempts} attempts of {self.timeout:g} seconds ({problem}). Answers so "
            "far are kept; run it again when the endpoint is up."
        )

    def complete_all(self, prompts: Sequence[str], keep: Path | None = None) -> list[str]:
        """The answers to all prompts.

        Args:
            prompts: To ask, each once.
            keep: A file of JSON lines; answers found in it are not asked for again.

        Raises:
            EndpointFailed: As `complete`; what was answered before is in the file.
        """
        known = _read(keep)
        for prompt in dict.fromkeys(prompts):
            name = self._name(prompt)
            if name not in known:
                known[name] = self.complete(prompt)
                if keep is not None:
                    keep.parent.mkdir(parents=True, exist_ok=True)
                    with keep.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"key": name, "prompt": prompt, "answer": known[name]}) + "\n")
        return [known[self._name(prompt)] for prompt in prompts]

    def _name(self, prompt: str) -> str:
        text = "\0".join((self.url, self.model, str(self.max_tokens), str(self.temperature), prompt))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _post(self, prompt: str) -> Any:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read()


def _content(body: bytes) -> str:
    """The text of a chat completion.

    Raises:
        EndpointFailed: If it is none.
    """
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointFailed(f"The endpoint's answer is no chat completion: {body[:200]!r}.") from error
    if not isinstance(content, str) or not content.strip():
        raise EndpointFailed("The endpoint answered with an empty text.")
    return content


def _wait(seconds: float, wanted: str | None) -> float:
    """How long to wait, as the endpoint wishes where it says so in seconds."""
    with suppress(ValueError):  # a date: our own waiting time will do
        seconds = max(seconds, float(wanted)) if wanted else seconds
    return min(seconds, LONGEST_WAIT)


def _read(keep: Path | None) -> dict[str, str]:
    """Answers in a file; a last line that was cut short counts as not answered."""
    known: dict[str, str] = {}
    if keep is None or not keep.exists():
        return known
    for line in keep.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            known[row["key"]] = row["answer"]
        except (ValueError, LookupError, TypeError):
            continue
    return known
