"""What is inside a language model: its network without wrappers, and hidden states where answers begin."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.audit.attacks.bare import bare_network, complete_places
from palimpsest.audit.language.asked import Question, language_of, questions
from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.modes import evaluating
from palimpsest.parts.decoder import final_norm, stack_of
from palimpsest.tasks.language import Language
from palimpsest.tasks.scoring import at_positions

ROWS = 64
"""Questions that go through a model at once."""
FITTED_ON = 100
"""Retained questions on which it is seen whether a head fits."""
FITS = 0.5


@dataclass(frozen=True)
class Opening:
    """A question up to the token that tells its answer from wrong ones.

    Attributes:
        ids: Tokens of the prompt, and of what all answers begin with ("555 " of phone numbers).
        token: The next token of the true answer.
    """

    ids: tuple[int, ...]
    token: int


def opening(task: Language, question: Question) -> Opening:
    """Where the answer to a question begins to differ from wrong ones; its first token where none is known.

    Raises:
        InvalidAudit: If the answer tokenizes to nothing.
    """
    gold, start = task.encode(question.question, question.answer)
    if len(gold) == start:
        raise InvalidAudit(f"The answer to {question.question!r} tokenizes to nothing.")
    others = [task.encode(question.question, wrong)[0] for wrong in question.wrong]
    at = min((_common(gold, other) for other in others), default=start)
    at = min(max(at, start), len(gold) - 1)
    return Opening(tuple(gold[:at]), gold[at])


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of what two rows of tokens begin with."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )


def network_of(evidence: Evidence, role: str) -> nn.Module:
    """The network of a model, as whoever holds the weights reads it: without a wrapper around it.

    The model itself where it holds no network of the original's tensors (or carries an adapter).
    """

    def find() -> nn.Module:
        model, original = evidence.model(role), evidence.original
        if original is None or role == ORIGINAL or not complete_places(model, original):
            return model
        bare = bare_network(model, original)
        return model if bare is None or not bare.place else evidence.runtime.place(bare.network)

    return evidence.remember("network", find, role)


def blocks_of(evidence: Evidence) -> int:
    """Number of blocks, the same of all models.

    Raises:
        InvalidAudit: If a model has no blocks, or their numbers differ.
    """
    try:
        sizes = {role: len(stack_of(network_of(evidence, role))) for role in evidence.roles}
    except ModelMismatch as problem:
        raise InvalidAudit(str(problem)) from problem
    if len(set(sizes.values())) > 1:
        raise InvalidAudit(f"The models have different numbers of blocks: {sizes}.")
    return next(iter(sizes.values()))


def spread_out(count: int, most: int) -> list[int]:
    """Numbers of at most `most` blocks, evenly spaced, the last among them.

    Example:
        >>> spread_out(12, 4), spread_out(2, 8)
        ([2, 5, 8, 11], [0, 1])
    """
    if count <= most:
        return list(range(count))
    return [round((number + 1) * count / most) - 1 for number in range(most)]


def states(evidence: Evidence, role: str, asked: Sequence[Question]) -> Float[Tensor, "blocks questions dim"]:
    """Outputs of every block at the last token of each opening, on the CPU, remembered.

    Args:
        evidence: Whose model in the role is read.
        role: Of the model.
        asked: The questions.
    """
    task = language_of(evidence)
    openings = [opening(task, item) for item in asked]
    key = ("states", tuple(item.ids for item in openings))
    return evidence.remember(key, partial(_states, evidence, role, openings), role)


@torch.no_grad()
def _states(
    evidence: Evidence, role: str, openings: Sequence[Opening]
) -> Float[Tensor, "blocks questions dim"]:
    task, model = language_of(evidence), evidence.runtime.place(network_of(evidence, role))
    evidence.runtime.count_pass(f"states {role}")
    pieces: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(openings), ROWS):
            ids = [item.ids for item in openings[start : start + ROWS]]
            batch = evidence.runtime.to_device(dict(task.padded(ids, [0] * len(ids))))
            with watching(model) as seen:
                task.logits(model, batch)
            last = batch["attention_mask"].sum(1) - 1
            pieces.append(torch.stack([at_positions(state, last).float().cpu() for state in seen]))
    return torch.cat(pieces, 1)


@contextmanager
def watching(model: nn.Module) -> Generator[list[Tensor]]:
    """The outputs of all blocks during one pass, each [rows, tokens, dim], in order."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(first_of(output)))
        for block in stack_of(model).blocks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first_of(output: Any) -> Tensor:
    """The hidden states among what a block gives."""
    return output[0] if isinstance(output, tuple) else output


def put_first(output: Any, states: Tensor) -> Any:
    """What a block gives, with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def head_role(evidence: Evidence, role: str) -> str:
    """Whose head the states of a model were made for: the unlearned model's for the original's, if it descends from it.

    A head that was trained to hide answers reads nothing in states that still hold them; the head from before
    does. Whether it still fits is seen on retained questions: if it gives their answers less than `FITS` of the
    probability that the model's own head gives, the model was made anew, and its own head is taken.
    """
    if role != UNLEARNED or evidence.original is None:
        return role

    def decide() -> str:
        if not evidence.has("retain"):
            return ORIGINAL
        asked = questions(evidence, "retain", FITTED_ON)
        hidden, tokens = states(evidence, role, asked)[-1:], tokens_of(evidence, asked)
        own, first = (
            float(read_out(evidence, whose, hidden)[0].gather(1, tokens[:, None]).exp().mean())
            for whose in (role, ORIGINAL)
        )
        return ORIGINAL if first >= FITS * own else role

    return evidence.remember("head", decide, role)


def head_of(evidence: Evidence, role: str) -> nn.Module:
    """The output layer of a model.

    Raises:
        InvalidAudit: If the model does not say which it is.
    """
    model = network_of(evidence, role)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise InvalidAudit(f"The {role} model does not say what its head is (`get_output_embeddings`).")
    return head


@torch.no_grad()
def read_out(
    evidence: Evidence, role: str, hidden: Float[Tensor, "blocks questions dim"]
) -> Float[Tensor, "blocks questions vocabulary"]:
    """Log-probabilities of the next token, read off hidden states by the final norm and head of a model."""
    try:
        norm = final_norm(network_of(evidence, role))
    except ModelMismatch as problem:
        raise InvalidAudit(str(problem)) from problem
    head = head_of(evidence, role)
    weight = next(head.parameters())
    return head(norm(hidden.to(weight))).float().log_softmax(-1).cpu()


def tokens_of(evidence: Evidence, asked: Sequence[Question]) -> Int[Tensor, " questions"]:
    """The tokens that begin the true answers."""
    task = language_of(evidence)
    return torch.tensor([opening(task, item).token for item in asked])


def facts_of(asked: Sequence[Question]) -> np.ndarray[Any, Any]:
    """Number of the fact that every question asks for: several wordings of one are not independent."""
    return np.unique([f"{item.subject}\0{item.relation}" for item in asked], return_inverse=True)[1]
