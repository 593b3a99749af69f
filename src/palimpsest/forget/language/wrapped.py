"""A language model around another that stays as it is: the same `forward` and `generate`, other answers.

What only stands around a model has not removed anything from it; audits take it off (`inner`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import ModelMismatch
from palimpsest.tasks.scoring import cache_argument

if TYPE_CHECKING:
    from palimpsest.forget.language._noting_cache import NotingCache


@dataclass(frozen=True)
class Call:
    """What a model is asked to read.

    Attributes:
        ids: Tokens, [rows, tokens]; only those after what the cache holds, if there is one.
        mask: 1 for tokens that are read, [rows, tokens so far]; those in the cache included. None for all.
        positions: Of the tokens, [rows, tokens]; None lets the model count.
        cache: Of what was read before, with notes; None where nothing is kept.
        further: Other arguments of `forward` (`output_hidden_states`, ...).
        before: Tokens of a row that the cache held when the call came.
    """

    ids: Int[Tensor, "rows tokens"]
    mask: Int[Tensor, "rows all_tokens"] | None
    positions: Int[Tensor, "rows tokens"] | None
    cache: NotingCache | None
    further: dict[str, Any]
    before: int = 0

    @property
    def first(self) -> bool:
        """Whether nothing was read before: the rows begin with their prompts."""
        return self.before == 0

    @property
    def attended(self) -> Int[Tensor, "rows all_tokens"]:
        """The mask, of ones where none was given."""
        if self.mask is not None:
            return self.mask
        shape = (len(self.ids), self.before + self.ids.shape[1])
        return torch.ones(shape, dtype=torch.long, device=self.ids.device)

    def change(self, **changes: Any) -> Call:
        """The same call with other values."""
        return replace(self, **changes)


class Wrapped(nn.Module):
    """A model inside another.

    A kind of wrapper overrides `answer`, in which it asks `inner` (and others) by `ask`. Everything that
    `generate` of transformers can do (beams, sampling, streaming) then works on its answers: the generation
    code of the inner model runs as it is, with this `forward` in the place of the model's.

    Attributes:
        inner: The model that is wrapped, unchanged.
    """

    inner: nn.Module

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def answer(self, call: Call) -> Any:
        """The output for a call, of the kind that the inner model gives."""
        return ask(self.inner, call)

    def forward(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "rows all_tokens"] | None = None,
        position_ids: Int[Tensor, "rows tokens"] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **further: Any,
    ) -> Any:
        """As the inner model's.

        Args:
            input_ids: Tokens.
            attention_mask: Which of them, and of those in the cache, are read.
            position_ids: Of the tokens.
            cache: What an earlier call with `use_cache=True` gave.
            past_key_values: The same, under its older name.
            use_cache: Whether to keep what was read.
            **further: Passed on.

        Raises:
            ModelMismatch: If the cache is not one that a wrapper gave.
        """
        held = past_key_values if cache is None else cache
        if held is None and use_cache:
            held = self.new_cache()
        if held is not None and not hasattr(held, "notes"):
            raise ModelMismatch(
                f"A wrapped model continues from a cache that it gave itself, not from a {type(held).__name__}."
            )
        further.pop("logits_to_keep", None)
        before = 0 if held is None else int(held.get_seq_length())
        return self.answer(Call(input_ids, attention_mask, position_ids, held, further, before))

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **settings: Any) -> Any:
        """Write on, as the inner model's `generate` with the answers of this one.

        Args:
            inputs: Tokens of the prompts; `input_ids` is the same.
            **settings: As transformers has them.
        """
        face = self._face()
        name = cache_argument(self.plain)
        if settings.get("use_cache", True) and settings.get(name) is None:
            settings[name] = self.new_cache()
        return face.generate(inputs, **settings)

    def new_cache(self) -> NotingCache:
        """An empty cache for the inner model and whatever reads along."""
        from palimpsest.forget.language._noting_cache import NotingCache

        return NotingCache(text_config(self.plain))

    @property
    def plain(self) -> nn.Module:
        """The innermost model, without wrappers; with adapters, if it has them."""
        return self.inner.plain if isinstance(self.inner, Wrapped) else self.inner

    @property
    def config(self) -> Any:
        """The inner model's."""
        return self.inner.config

    @property
    def generation_config(self) -> Any:
        """The inner model's."""
        return self.inner.generation_config

    @property
    def device(self) -> torch.device:
        """Where the inner model is."""
        return next(self.inner.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the inner model's weights."""
        return next(self.inner.parameters()).dtype

    def get_input_embeddings(self) -> nn.Module:
        """The inner model's."""
        return self.inner.get_input_embeddings()  # pyright: ignore[reportCallIssue]

    def get_output_embeddings(self) -> nn.Module:
        """The inner model's."""
        return self.inner.get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def can_generate(self) -> bool:
        """As transformers asks."""
        return True

    def _face(self) -> Any:
        """The innermost model's generation code with this model's `forward`; shares all weights."""
        plain = self.plain
        inner = plain.get_base_model() if hasattr(plain, "get_base_model") else plain  # pyright: ignore[reportCallIssue]
        face = copy.copy(inner)
        face.__dict__["forward"] = _as_if(inner.forward, self.forward)  # pyright: ignore[reportArgumentType]
        return face


def ask(model: nn.Module, call: Call, beside: str | None = None) -> Any:
    """The output of a model for a call.

    Args:
        model: To ask; the inner model of a wrapper, or another that reads along.
        call: What to read.
        beside: Name of the cache of a model that reads along; None for the inner model's.
    """
    arguments: dict[str, Any] = {"input_ids": call.ids, **call.further}
    if call.mask is not None:
        arguments["attention_mask"] = call.mask
    if call.positions is not None:
        arguments["position_ids"] = call.positions
    if call.cache is not None:
        held = call.cache if beside is None else call.cache.cache_beside(beside, text_config(model))
        arguments |= {cache_argument(model): held, "use_cache": True}
    else:
        arguments["use_cache"] = False
    return model(**arguments)


def logits_beside(model: nn.Module, call: Call, beside: str) -> Float[Tensor, "rows tokens vocabulary"]:
    """Logits of a model that reads along."""
    further = {key: value for key, value in call.further.items() if not key.startswith("output_")}
    return ask(model, call.change(further=further), beside).logits


def text_config(model: nn.Module) -> Any:
    """The configuration of the decoder of a model; None if it has none."""
    config = getattr(model, "config", None)
    found = getattr(config, "get_text_config", None)
    return config if found is None else found(decoder=True)


def unwrapped_language_model(model: nn.Module) -> nn.Module:
    """The model inside all wrappers; a model without any is given back."""
    return model.plain if isinstance(model, Wrapped) else model


def _as_if(old: Callable[..., Any], new: Callable[..., Any]) -> Callable[..., Any]:
    """`new` with the signature of `old`, which generation code looks at."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return new(*args, **kwargs)

    signature = inspect.signature(old)
    kept = [item for name, item in signature.parameters.items() if name != "logits_to_keep"]
    forward.__signature__ = signature.replace(parameters=kept)  # pyright: ignore[reportFunctionMemberAccess]
    return forward
