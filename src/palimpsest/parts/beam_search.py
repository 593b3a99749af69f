"""Beam search over a language model's distribution, with penalties on what hypotheses may say.

The search is one loop. Hypotheses of all prompts are the rows of one batch; the keys and values that the model
keeps are moved with them. Without penalties it finds what the `generate` of transformers finds with as many beams.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.parts.constrained import START, PhraseMachine, penalised

Tokens = tuple[int, ...]
Judge = Callable[[int, Sequence[Tokens]], Sequence[float]]
"""From the number of a prompt and candidates (all that each has written) to what is subtracted from their scores."""


@dataclass(frozen=True)
class Hypothesis:
    """What a beam has written.

    Attributes:
        tokens: Written so far, a stop token included.
        score: Sum of log-probabilities minus penalties.
        state: Of the prompt's phrase machine.
        row: Of the batch of the last step.
        fallback: Whether the search ended because nothing more was allowed.
    """

    tokens: Tokens = ()
    score: float = 0.0
    state: int = START
    row: int = 0
    fallback: bool = False

    def normalised(self, length_penalty: float) -> float:
        """Score over length to the power of `length_penalty`."""
        return self.score / max(len(self.tokens), 1) ** length_penalty


@dataclass(frozen=True)
class Restriction:
    """What candidates lose.

    Attributes:
        machines: Of every prompt.
        prefix: See `palimpsest.parts.constrained.penalised`.
        judge: Looks at what was written; its penalties may be infinite.
        reorders: Whether the judge's finite penalties change the order, so that every candidate must be seen.
    """

    machines: Sequence[PhraseMachine | None] = ()
    prefix: float = 0.0
    judge: Judge | None = None
    reorders: bool = False


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        width: Hypotheses per prompt.
        max_new_tokens: Of each.
        stops: Tokens that end an answer.
        length_penalty: Exponent of the length that scores are divided by.
        returned: Answers per prompt.
    """

    width: int
    max_new_tokens: int
    stops: frozenset[int]
    length_penalty: float = 1.0
    returned: int = 1


@torch.no_grad()
def beam_search(
    model: nn.Module,
    ids: Int[Tensor, "prompts tokens"],
    mask: Int[Tensor, "prompts tokens"],
    search: Search,
    restriction: Restriction | None = None,
    shared: Callable[[Tokens], None] | None = None,
) -> list[list[Hypothesis]]:
    """The best answers to prompts, the best first.

    A candidate with an infinite penalty is left out. Where a hypothesis has none left it is dropped; where all
    of a prompt are dropped and none has ended, its answer is what the last ones had in common, and a stop token.

    Args:
        model: A causal language model.
        ids: Prompts, padded on the left.
        mask: 1 where there is a token.
        search: How to search.
        restriction: What candidates lose; nothing by default.
        shared: Called after each step with what all hypotheses that may still win begin with; of a single prompt.

    Returns:
        For every prompt `returned` hypotheses, fewer where so many were not found.
    """
    restriction = restriction or Restriction()
    machines = list(restriction.machines) or [None] * len(ids)
    grown = _Growing(model, ids, mask)
    live = [[Hypothesis(row=row)] for row in range(len(ids))]
    ended: list[list[Hypothesis]] = [[] for _ in live]
    for length in range(1, search.max_new_tokens + 1):
        rows = [(prompt, one) for prompt, beams in enumerate(live) for one in beams]
        if not rows:
            break
        log_p = grown.log_probabilities()
        states = [one.state for _, one in rows]
        scores = penalised(log_p, [machines[at] for at, _ in rows], states, restriction.prefix)
        best, tokens = scores.topk(min(2 * search.width, scores.shape[1]), dim=1)
        candidates: list[list[tuple[float, Hypothesis, int]]] = [[] for _ in live]
        for row, (prompt, one) in enumerate(rows):
            parent = replace(one, row=row)
            for score, token in zip(best[row].tolist(), tokens[row].tolist(), strict=True):
                if score > -math.inf:
                    candidates[prompt].append((one.score + score, parent, token))
        for prompt, those in enumerate(candidates):
            if live[prompt]:
                before = live[prompt]
                live[prompt], new = _chosen(prompt, those, machines[prompt], search, restriction)
                ended[prompt] = _best(ended[prompt] + new, search)
                if not live[prompt] and not ended[prompt]:
                    ended[prompt] = [_given_up(before, search)]
                elif length == search.max_new_tokens or _decided(live[prompt], ended[prompt], search):
                    ended[prompt] = (
                        _best(ended[prompt] + live[prompt], search)
                        if length == search.max_new_tokens
                        else ended[prompt]
                    )
                    live[prompt] = []
        if shared is not None:
            shared(common_start([one.tokens for one in (*live[0], *ended[0])]))
        left = [one for beams in live for one in beams]
        if left:
            grown.advance([one.row for one in left], [one.tokens[-1] for one in left])
    return [beams[: search.returned] for beams in ended]


def _chosen(
    prompt: int,
    candidates: list[tuple[float, Hypothesis, int]],
    machine: PhraseMachine | None,
    search: Search,
    restriction: Restriction,
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """The best hypotheses that go on, and those of the best that end."""
    order = sorted(candidates, key=lambda each: -each[0])
    allowed = _judged(prompt, order, search, restriction)
    live: list[Hypothesis] = []
    ended: list[Hypothesis] = []
    for rank, (score, parent, token) in enumerate(allowed):
        state = START if machine is None else machine.step(parent.state, token)
        one = Hypothesis((*parent.tokens, token), score, state, parent.row)
        if token in search.stops:
            if rank < search.width:
                ended.append(one)
        else:
            live.append(one)
        if len(live) == search.width:
            break
    return live, ended


def _judged(
    prompt: int,
    order: list[tuple[float, Hypothesis, int]],
    search: Search,
    restriction: Restriction,
) -> list[tuple[float, Hypothesis, int]]:
    """Candidates that the judge allows, best first; it sees no more of them than are needed."""
    if restriction.judge is None:
        return order
    size = len(order) if restriction.reorders else 2 * search.width
    allowed: list[tuple[float, Hypothesis, int]] = []
    for start in range(0, len(order), max(size, 1)):
        chunk = order[start : start + size]
        written = [
            parent.tokens if token in search.stops else (*parent.tokens, token) for _, parent, token in chunk
        ]
        penalties = restriction.judge(prompt, written)
        for (score, parent, token), penalty in zip(chunk, penalties, strict=True):
            if penalty < math.inf:
                allowed.append((score - penalty, parent, token))
        if sum(token not in search.stops for _, _, token in allowed) >= search.width:
            break
    return sorted(allowed, key=lambda each: -each[0])


def _best(hypotheses: list[Hypothesis], search: Search) -> list[Hypothesis]:
    ordered = sorted(hypotheses, key=lambda one: -one.normalised(search.length_penalty))
    return ordered[: max(search.width, search.returned)]


def _decided(live: list[Hypothesis], ended: list[Hypothesis], search: Search) -> bool:
    """Whether no hypothesis that goes on looks better than the worst of as many ended ones as beams."""
    if not live:
        return True
    if len(ended) < search.width:
        return False
    power = search.length_penalty
    return live[0].normalised(power) <= ended[-1].normalised(power)


def _given_up(last: list[Hypothesis], search: Search) -> Hypothesis:
    start = common_start([one.tokens for one in last])
    return Hypothesis((*start, min(search.stops)), -math.inf, fallback=True)


def common_start(rows: Sequence[Tokens]) -> Tokens:
    """What all rows begin with.

    Example:
        >>> common_start([(1, 2, 3), (1, 2), (1, 2, 4)])
        (1, 2)
    """
    if not rows:
        return ()
    shortest, longest = min(rows), max(rows)
    for at, token in enumerate(shortest):
        if at >= len(longest) or longest[at] != token:
            return shortest[:at]
    return shortest


class _Growing:
    """A batch of sequences that grow by a token at a time, with the keys and values of what they hold."""

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor):
        self.model, self.ids, self.mask = model, ids, mask
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._positions = "position_ids" in parameters
        self._cache = None
        self._read = 0

    def log_probabilities(self) -> Float[Tensor, "rows vocabulary"]:
        """Of the next token of every sequence."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        settings = {} if self._cache is None else {self._cache_name: self._cache}
        if self._positions:
            settings["position_ids"] = positions[:, self._read :]
        output = self.model(
            input_ids=self.ids[:, self._read :], attention_mask=self.mask, use_cache=True, **settings
        )
        cache = getattr(output, "past_key_values", None)
        if cache is not None and hasattr(cache, "batch_select_indices"):
            self._cache, self._read = cache, self.ids.shape[1]
        return getattr(output, "logits", output)[:, -1].float().log_softmax(-1)

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """The sequences of the given rows, each with one more token."""
        owner = torch.tensor(rows, device=self.ids.device)
        new = torch.tensor(tokens, device=self.ids.device)[:, None]
        self.ids = torch.cat([self.ids[owner], new], 1)
        self.mask = torch.cat([self.mask[owner], torch.ones_like(new)], 1)
        if self._cache is not None:
            self._cache.batch_select_indices(owner)
