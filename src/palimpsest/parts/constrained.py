"""Constrained generation by state machine: token sequences that must not appear, matched while they are written.

All forbidden sequences are one machine (Aho and Corasick 1975): its state is the longest beginning of any of them
that the tokens written so far end with. A state is a number, so a beam that is copied or moved takes its state
along, and what a token would do is looked up, not searched for.

Only what is written moves the machine. The prompt does not: a name that the question mentions would be blocked
at once, or half a phrase in the prompt would block its other half.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.unlearner import check_range

START = 0
"""State before anything is written."""


@dataclass(frozen=True)
class Moves:
    """Tokens that do more than lead a state back to the start.

    Attributes:
        tokens: Their ids.
        share: Largest share of a forbidden sequence that is matched after each.
        complete: Whether it completes one.
    """

    tokens: Int[Tensor, " moves"]
    share: Float[Tensor, " moves"]
    complete: Bool[Tensor, " moves"]


@dataclass(frozen=True)
class PhraseMachine:
    """A machine that reads tokens and knows which of the forbidden sequences they are about to complete.

    Attributes:
        edges: Next state by token, for every state of the trie.
        fail: Longest proper suffix of every state that is a state.
        share: Largest share of a sequence that a state has matched.
        complete: Whether a sequence ends in a state.
    """

    edges: tuple[dict[int, int], ...]
    fail: tuple[int, ...]
    share: tuple[float, ...]
    complete: tuple[bool, ...]
    _moves: dict[int, Moves] = field(default_factory=dict[int, Moves], init=False, repr=False, compare=False)

    def step(self, state: int, token: int) -> int:
        """The state after one more token."""
        while token not in self.edges[state]:
            if state == START:
                return START
            state = self.fail[state]
        return self.edges[state][token]

    def run(self, tokens: Iterable[int], state: int = START) -> int:
        """The state after several tokens."""
        for token in tokens:
            state = self.step(state, token)
        return state

    def states(self, tokens: Iterable[int]) -> list[int]:
        """The state before each of the tokens."""
        before: list[int] = []
        state = START
        for token in tokens:
            before.append(state)
            state = self.step(state, token)
        return before

    def leaks(self, tokens: Iterable[int]) -> bool:
        """Whether a forbidden sequence occurs in the tokens."""
        state = START
        return any(self.complete[state := self.step(state, token)] for token in tokens)

    def moves(self, state: int) -> Moves:
        """Every token that begins, continues or completes a sequence; kept for the next call."""
        if state not in self._moves:
            tokens: set[int] = set()
            at = state
            while True:
                tokens.update(self.edges[at])
                if at == START:
                    break
                at = self.fail[at]
            order = sorted(tokens)
            after = [self.step(state, token) for token in order]
            self._moves[state] = Moves(
                torch.tensor(order, dtype=torch.long),
                torch.tensor([self.share[to] for to in after]),
                torch.tensor([self.complete[to] for to in after], dtype=torch.bool),
            )
        return self._moves[state]


def phrase_machine(sequences: Iterable[Sequence[int]]) -> PhraseMachine:
    """The machine of some token sequences.

    Raises:
        InvalidHyperparameter: If one of them is empty: it would occur everywhere.

    Example:
        >>> machine = phrase_machine([(5, 6), (6, 7, 8)])
        >>> machine.leaks([5, 7, 8]), machine.leaks([5, 5, 6])
        (False, True)
        >>> machine.moves(machine.run([6, 7])).complete.tolist()  # of tokens 5, 6 and 8
        [False, False, True]
    """
    edges: list[dict[int, int]] = [{}]
    shares: list[float] = [0.0]
    ends: set[int] = set()
    for sequence in sequences:
        if not len(sequence):
            raise InvalidHyperparameter("A forbidden phrase has no tokens: give at least one.")
        state = START
        for depth, token in enumerate(sequence, 1):
            if token not in edges[state]:
                edges[state][token] = len(edges)
                edges.append({})
                shares.append(0.0)
            state = edges[state][token]
            shares[state] = max(shares[state], depth / len(sequence))
        ends.add(state)
    fail = [START] * len(edges)
    waiting = deque(edges[START].values())
    while waiting:
        state = waiting.popleft()
        if fail[state] in ends:
            ends.add(state)
        shares[state] = max(shares[state], shares[fail[state]])
        for token, child in edges[state].items():
            suffix = fail[state]
            while suffix != START and token not in edges[suffix]:
                suffix = fail[suffix]
            fail[child] = edges[suffix].get(token, START)
            waiting.append(child)
    complete = tuple(state in ends for state in range(len(edges)))
    return PhraseMachine(tuple(edges), tuple(fail), tuple(shares), complete)


def penalised(
    scores: Float[Tensor, "rows vocabulary"],
    machines: Sequence[PhraseMachine | None],
    states: Sequence[int],
    prefix: float = 0.0,
    complete: float = math.inf,
) -> Float[Tensor, "rows vocabulary"]:
    """Scores of the next token without those of tokens that lead into forbidden sequences.

    Args:
        scores: Logits or log-probabilities.
        machines: Of every row; None leaves it as it is.
        states: Of every row.
        prefix: Subtracted from a token that continues a sequence, times the share that is then matched.
        complete: Subtracted from a token that completes one.

    Raises:
        ModelMismatch: If a forbidden token lies outside the vocabulary.
    """
    rows: list[Tensor] = []
    tokens: list[Tensor] = []
    penalties: list[Tensor] = []
    for row, (machine, state) in enumerate(zip(machines, states, strict=True)):
        if machine is None:
            continue
        moves = machine.moves(state)
        rows.append(torch.full_like(moves.tokens, row))
        tokens.append(moves.tokens)
        penalties.append(torch.where(moves.complete, complete, prefix * moves.share))
    if not rows:
        return scores
    at, which = torch.cat(rows), torch.cat(tokens)
    if which.numel() and int(which.max()) >= scores.shape[1]:
        raise ModelMismatch(
            f"A forbidden phrase has the token {int(which.max())}, the vocabulary has {scores.shape[1]}."
        )
    result = scores.clone()
    result[at.to(scores.device), which.to(scores.device)] -= torch.cat(penalties).to(scores)
    return result


class ForbiddenPhrases:
    """A logits processor for the `generate` of transformers: no output holds a forbidden sequence.

    With beams, `generate` gives the rows of every beam in any order; the state of a row is found from its own
    tokens (and remembered by them), so a beam that was moved has the state of what it holds.

    Args:
        machines: One for all rows, or one (or None) for every prompt of the batch.
        prompt: Number of tokens of the (padded) prompt, which are not matched.
        prefix: See `penalised`.
        complete: See `penalised`.

    Raises:
        InvalidHyperparameter: If a penalty is negative, or the prompt has no tokens.
    """

    def __init__(
        self,
        machines: PhraseMachine | Sequence[PhraseMachine | None],
        prompt: int,
        prefix: float = 0.0,
        complete: float = math.inf,
    ):
        check_range("prefix", prefix, 0, math.inf)
        check_range("complete", complete, 0, math.inf, open_low=True)
        check_range("prompt", prompt, 0, math.inf)
        self.machines, self.prompt = machines, prompt
        self.prefix, self.complete = prefix, complete
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Scores with -inf for every token that would complete a forbidden sequence."""
        machines = self._of_rows(len(input_ids))
        written = input_ids[:, self.prompt :].tolist()
        pairs = zip(machines, written, strict=True)
        states = [START if machine is None else self._state(machine, tuple(row)) for machine, row in pairs]
        return penalised(scores, machines, states, self.prefix, self.complete)

    def _of_rows(self, rows: int) -> list[PhraseMachine | None]:
        if isinstance(self.machines, PhraseMachine):
            return [self.machines] * rows
        prompts = len(self.machines)
        if not prompts or rows % prompts:
            raise ModelMismatch(f"{rows} rows do not divide among the machines of {prompts} prompts.")
        return [machine for machine in self.machines for _ in range(rows // prompts)]

    def _state(self, machine: PhraseMachine, written: tuple[int, ...]) -> int:
        key = (id(machine), written)
        if key not in self._known:
            before = self._known.get((id(machine), written[:-1])) if written else None
            state = machine.run(written) if before is None else machine.step(before, written[-1])
            self._known[key] = state
        return self._known[key]


def written_forms(phrase: str) -> list[str]:
    """A phrase with and without a leading blank, as given, small, capital and capitalised.

    Tokenizers give each of these other tokens.

    Example:
        >>> written_forms("Ada B")[:4]
        ['Ada B', ' Ada B', 'ada b', ' ada b']
    """
    phrase = phrase.strip()
    cases = dict.fromkeys((phrase, phrase.lower(), phrase.upper(), phrase.capitalize(), phrase.title()))
    return [blank + form for form in cases for blank in ("", " ")]


def token_sequences(phrases: Iterable[str], tokenize: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
    """Tokens of all written forms of some phrases, each once.

    Args:
        phrases: Words that must not appear.
        tokenize: From a text to its tokens, without special ones.
    """
    found = (tuple(tokenize(form)) for phrase in phrases for form in written_forms(phrase))
    return list(dict.fromkeys(tokens for tokens in found if tokens))
