"""The model of `palimpsest.forget.language.combine`; apart, because importing transformers takes a while."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from palimpsest.core.errors import ModelMismatch
from palimpsest.parts.tokens import token_mean

if TYPE_CHECKING:
    from palimpsest.forget.language.combine import Combination


class JointCache(Cache):
    """Keys and values of several models, each in a cache of its own, reordered and cut together.

    Args:
        caches: One per model; the first says how many tokens are in.
    """

    def __init__(self, caches: Sequence[Cache]):
        super().__init__(layers=[])
        self.caches = tuple(caches)
        self.gather()

    def gather(self) -> None:
        """Take up layers that a cache has made since: whatever is done to all layers reaches every model."""
        self.layers = [layer for cache in self.caches for layer in cache.layers]


class CombinedModel(PreTrainedModel, GenerationMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Several causal models that answer as one; made by `combine.combined`.

    Attributes:
        inner: The wrapped model.
        others: The models that are combined with it.
        combination: How.
    """

    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    """Of no consequence here: every model attends in its own way."""

    def __init__(self, inner: nn.Module, others: Sequence[nn.Module], combination: Combination):
        super().__init__(copy.deepcopy(inner.config))  # pyright: ignore[reportArgumentType]
        self.inner = inner
        self.others = nn.ModuleList(others)
        self.combination = combination
        settings: Any = getattr(inner, "generation_config", None)
        if settings is not None:
            self.generation_config = copy.deepcopy(settings)
        self.train(inner.training)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The wrapped model, then the others."""
        return (self.inner, *self.others)

    def get_input_embeddings(self) -> nn.Module:
        """Of the wrapped model."""
        return self.inner.get_input_embeddings()  # pyright: ignore[reportCallIssue]

    def get_output_embeddings(self) -> nn.Module:
        """Of the wrapped model."""
        return self.inner.get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int = 0,
        generating: bool = False,
        **settings: Any,
    ) -> CausalLMOutputWithPast:
        """Combined logits of the same tokens; hidden states and attentions are the wrapped model's.

        Args:
            input_ids: Tokens.
            attention_mask: 0 on padding.
            position_ids: Positions; each model's own by default.
            cache: What an earlier call gave back.
            past_key_values: The same under its older name.
            labels: To give the mean token loss too.
            use_cache: Whether keys and values are given back.
            output_hidden_states: Whether hidden states are.
            output_attentions: Whether attentions are.
            logits_to_keep: Only so many of the last positions; 0 for all.
            generating: Whether a token is about to be chosen: `generate` says so.
            **settings: Passed on to every model.

        Raises:
            ModelMismatch: For a filled cache that is not of this model.
        """
        kept = self._caches(cache if cache is not None else past_key_values)
        shared: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache, **settings}
        shared["return_dict"] = True
        if position_ids is not None:
            shared["position_ids"] = position_ids
        if logits_to_keep:
            shared["logits_to_keep"] = logits_to_keep
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs = []
        for number, (model, own) in enumerate(zip(self.models, kept, strict=True)):
            asked = {} if number else wanted
            more: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
            if own is not None:
                more[cache_argument(model)] = own
            outputs.append(model(input_ids=input_ids, **shared, **more))
        logits = self.combination.logits(*(output.logits for output in outputs), generating=generating)
        loss = None if labels is None else token_mean(logits, labels)
        return self._output(loss, logits, outputs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of the next step, which is one of generation."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return {**inputs, "generating": True}

    def _caches(self, given: Cache | None) -> Sequence[Cache | None]:
        """One cache per model; each makes its own where nothing is cached yet."""
        if isinstance(given, JointCache) and len(given.caches) == len(self.models):
            return given.caches
        if given is not None and given.get_seq_length():
            raise ModelMismatch("The cache is not one that this combination of models gave back.")
        return [None] * len(self.models)

    def _output(
        self, loss: Tensor | None, logits: Float[Tensor, "batch tokens vocabulary"], outputs: Sequence[Any]
    ) -> CausalLMOutputWithPast:
        caches = [_cache_in(output) for output in outputs]
        rest: dict[str, Any] = {}
        if all(isinstance(own, Cache) for own in caches):
            name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
            rest[name] = JointCache([own for own in caches if own is not None])
        first = outputs[0]
        return CausalLMOutputWithPast(
            loss=loss, logits=logits,  # pyright: ignore[reportArgumentType]
            hidden_states=getattr(first, "hidden_states", None), attentions=getattr(first, "attentions", None), **rest,
        )  # fmt: skip


def cache_argument(model: nn.Module) -> str:
    """What a model calls the keys and values that it is handed back: newer releases of transformers, "cache"."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    return "cache" if "cache" in inspect.signature(bare.forward).parameters else "past_key_values"


def _cache_in(output: Any) -> Cache | None:
    return output["cache"] if "cache" in output else output.get("past_key_values")


__all__ = ["CombinedModel", "JointCache", "cache_argument"]
