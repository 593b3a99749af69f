"""DualPrompt: prompts for all experiences in early blocks, prompts of one experience in later ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.attention_blocks import Prefix, prefixes
from palimpsest.retain.heads import masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.prompting import (
    PUBLISHED_DEPTH,
    anneal,
    check_blocks,
    check_kept_optimizer,
    check_prefix,
    check_spread,
    check_tasks,
    check_weight,
    cosines,
    frozen,
    halves,
    new_class_loss,
    only_trains,
    query,
    query_width,
    uniform,
)
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner(
    "dual-prompt",
    keeps={Keeps.PRETRAINED, Keeps.BOUNDARIES},
    paper=Paper(
        "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", "ECCV 2022", "2204.04799"
    ),
    search={"key_weight": Span(0.01, 1.0, log=True)},
)
@dataclass(eq=False)
class DualPrompt:
    """A general prompt that all experiences train, and an expert prompt and key for each of them.

    The network stays as it was pretrained, in evaluation mode also while learning; prompts, the experience's key
    and the head train. Prompts are further keys and values of the attention of some blocks, after its
    projections as in the published code. Training takes the experience's own expert prompt and pulls its key to
    the queries (class tokens without prompts): L = CE(classes of the experience) + key_weight * mean(1 - cos(q,
    key)). When predicting, a record takes the expert prompt of the nearest key of the experiences met; no task id
    is asked, also where there is one. Prompts of other experiences do not move, whatever the optimiser.

    Attributes:
        tasks: Experiences that there are prompts for.
        general: Rows of the general prompt, half keys and half values: the release for CODA-Prompt has 6; the
            first publication 5 keys and 5 values, which is 10.
        expert: Rows of each expert prompt: 20, or 40.
        general_blocks: Where the general prompt stands. By default blocks 0 and 1; in networks of fewer than
            five blocks the first two fifths (1 of 2 or 3, 2 of 4, none of 1).
        expert_blocks: Where expert prompts stand. By default blocks 2 to 4; in shallower networks all that the
            default leaves for them.
        key_weight: Weight of the pull on keys.
        spread: Prompts and keys begin uniform in [-spread, spread). Keys turn only so far in a short training
            with a small lr: a smaller spread lets them turn faster.
        annealed: Cosine schedule of the lr over the epochs of an experience.
    """

    tasks: int = 10
    general: int = 6
    expert: int = 20
    general_blocks: Sequence[int] | None = None
    expert_blocks: Sequence[int] | None = None
    key_weight: float = 1.0
    spread: float = 1.0
    annealed: bool = True

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise InvalidHyperparameter(f"tasks must be at least 1, not {self.tasks}.")
        check_prefix("general", self.general)
        check_prefix("expert", self.expert)
        check_weight("key_weight", self.key_weight)
        check_spread(self.spread)
        if self.expert_blocks is not None and not self.expert_blocks:
            raise InvalidHyperparameter("expert_blocks must name at least one block.")

    def begin(self, student: Student) -> None:
        """Freeze a fresh student's network and draw prompts and keys.

        Raises:
            ModelMismatch: If the network is no vision transformer.
            InvalidHyperparameter: If it has no such block, a block has both kinds of prompts, or the optimiser
                is to be kept.
        """
        check_kept_optimizer(student)
        self.student, self.encoder = student, frozen(student)
        first, later = default_blocks(len(self.encoder))
        general, expert = self.general_blocks, self.expert_blocks
        self.first = check_blocks("general_blocks", first if general is None else general, self.encoder)
        self.later = check_blocks("expert_blocks", later if expert is None else expert, self.encoder)
        both = sorted(set(self.first) & set(self.later))
        if both:
            raise InvalidHyperparameter(f"Block {both[0]} has both a general and an expert prompt: take one.")
        width, keys = self.encoder.attentions[0].width, query_width(student)
        with student.runtime.seeded("prompts"):
            self.shared = uniform(len(self.first), self.general, width, spread=self.spread)
            self.experts = nn.ParameterList(
                uniform(len(self.later), self.expert, width, spread=self.spread) for _ in range(self.tasks)
            )
            self.keys = nn.ParameterList(uniform(keys, spread=self.spread) for _ in range(self.tasks))
        student.attach("general prompt", nn.ParameterList([self.shared]))
        student.attach("expert prompts", self.experts)
        student.attach("keys", self.keys)

    def observe(self, experience: Experience) -> None:
        """Fit the general prompt, this experience's own prompt and key, and the head.

        Raises:
            InvalidStream: If there are more experiences than tasks.
        """
        student, index = self.student, experience.index
        check_tasks(index, self.tasks)
        only_trains(self.experts, index)
        only_trains(self.keys, index)
        with student.learning(experience):
            student.model.eval()
            for epoch in student.epochs():
                anneal(student, epoch, self.annealed)
                for batch in student.batches(experience.records):
                    view = student.augmented(batch)
                    similar = cosines(query(student, view), self.keys[index][None])
                    own = torch.full((len(similar),), index, device=similar.device)
                    with self.shown(own):
                        logits = student.logits(view)
                    loss = new_class_loss(logits, batch["label"], experience.classes)
                    student.step(loss + self.key_weight * (1 - similar).mean())

    @torch.no_grad()
    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The allowed class of largest logit, with the expert prompt of the nearest key."""
        student, allowed = self.student, self.student.allowed(batch)
        with evaluating(student.model), self.shown(self.chosen(batch)):
            logits = student.logits(batch)
        return masked(logits, allowed).argmax(1)

    @torch.no_grad()
    def chosen(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The experience whose key is nearest to each record's query, among those met."""
        met = torch.stack(list(self.keys)[: self.student.experiences])
        with evaluating(self.student.model):
            return cosines(query(self.student, batch), met).argmax(1)

    def shown(self, experts: Int[Tensor, " batch"]) -> AbstractContextManager[None]:
        """The network as it sees the general prompt and, row by row, the expert prompts of some experiences."""
        shown: dict[int, Prefix] = {}
        for block, prompt in zip(self.first, self.shared, strict=True):
            shown[block] = halves(prompt.expand(len(experts), -1, -1))
        met = torch.stack(list(self.experts)[: self.student.experiences], 1)
        for block, prompts in zip(self.later, met, strict=True):
            shown[block] = halves(prompts[experts])
        return prefixes(self.encoder, shown)

    def state_dict(self) -> dict[str, Any]:
        """The student's state, prompts and keys among it."""
        return {"student": self.student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])


def default_blocks(depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks of general and of expert prompts: 0-1 and 2-4, or in the same ratio in shallower networks.

    Example:
        >>> default_blocks(12), default_blocks(3)
        (((0, 1), (2, 3, 4)), ((0,), (1, 2)))
    """
    depth = min(depth, PUBLISHED_DEPTH)
    first = round(2 * depth / PUBLISHED_DEPTH) if depth > 1 else 0
    return tuple(range(first)), tuple(range(first, depth))
