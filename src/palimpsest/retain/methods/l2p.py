"""L2P: learning to prompt. A pool of prompts, of which every input picks those whose keys are near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.attention_blocks import prefixes, tokens
from palimpsest.retain.heads import masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.prompting import (
    anneal,
    check_blocks,
    check_prefix,
    check_spread,
    check_weight,
    cosines,
    frozen,
    new_class_loss,
    query,
    query_width,
    uniform,
)
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner(
    "l2p",
    keeps={Keeps.PRETRAINED},
    paper=Paper("Learning to Prompt for Continual Learning", "CVPR 2022", "2112.08654"),
    search={"key_weight": Span(0.01, 1.0, log=True)},
)
@dataclass(eq=False)
class L2P:
    """A pool of prompts beside a frozen vision transformer; each input picks those of nearest keys.

    The network stays as it was pretrained, in evaluation mode also while learning; prompts, keys and the head
    train. The query of an input is its class token without prompts. The `top` prompts whose keys have the
    largest cosine with it stand behind the class token, without positions, and
    L = CE(classes of the experience) - key_weight * (sum of selected cosines) / batch. All experiences share the
    pool, no boundary is used in it, and no task id. Not implemented: the paper's optional penalty on prompts
    that are picked often, which needs boundaries.

    The published variant "L2P++" is pool=30, length=20, form="prefix", blocks=(0,), read="class".

    Attributes:
        pool: Prompts.
        length: Rows of each; of a prefix the first half are keys, the second values.
        top: Prompts that an input picks.
        key_weight: Weight of the pull on picked keys.
        form: "tokens" before the first block, or "prefix" keys and values in `blocks`.
        blocks: Of prefixes; one choice of prompts serves all of them.
        read: What the head reads: the mean output of the "prompts" as published, or the "class" token. With
            prefixes only the class token.
        batchwise: Whether in training all records of a batch take the prompts that most of them pick, as in the
            published code. Never when predicting.
        spread: Prompts and keys begin uniform in [-spread, spread). Keys turn only so far in a short training
            with a small lr: a smaller spread lets them turn faster.
        annealed: Cosine schedule of the lr over the epochs of an experience.
    """

    pool: int = 10
    length: int = 5
    top: int = 5
    key_weight: float = 0.1
    form: Literal["tokens", "prefix"] = "tokens"
    blocks: Sequence[int] = (0,)
    read: Literal["prompts", "class"] = "prompts"
    batchwise: bool = False
    spread: float = 1.0
    annealed: bool = True

    def __post_init__(self) -> None:
        if self.length < 1 or not 1 <= self.top <= self.pool:
            raise InvalidHyperparameter(
                f"length must be at least 1 and top in [1, pool]; not length={self.length}, top={self.top}, "
                f"pool={self.pool}."
            )
        check_weight("key_weight", self.key_weight)
        check_spread(self.spread)
        known = {"form": ("tokens", "prefix"), "read": ("prompts", "class")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InvalidHyperparameter(
                    f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}."
                )
        if self.form == "prefix":
            check_prefix("length", self.length)
            if self.read == "prompts" or not self.blocks:
                raise InvalidHyperparameter(
                    "Prefixes have no outputs: take read='class', and name at least one of blocks."
                )

    def begin(self, student: Student) -> None:
        """Freeze a fresh student's network and draw prompts and keys.

        Raises:
            ModelMismatch: If the network is no vision transformer, or has no norm to read prompts behind.
            InvalidHyperparameter: If it has no such block.
        """
        self.student, self.encoder = student, frozen(student)
        if self.read == "prompts" and self.encoder.norm is None:
            raise ModelMismatch("No norm follows the network's last block: take read='class'.")
        places, width = 1, self.encoder.width
        if self.form == "prefix":
            places = len(check_blocks("blocks", self.blocks, self.encoder))
            width = self.encoder.attentions[0].width
        with student.runtime.seeded("prompts"):
            self.keys = uniform(self.pool, query_width(student), spread=self.spread)
            self.prompts = uniform(places, self.pool, self.length, width, spread=self.spread)
        student.attach("prompts", nn.ParameterList([self.keys, self.prompts]))

    def observe(self, experience: Experience) -> None:
        """Fit prompts, their keys and the head to the new classes."""
        student = self.student
        with student.learning(experience):
            student.model.eval()
            for epoch in student.epochs():
                anneal(student, epoch, self.annealed)
                for batch in student.batches(experience.records):
                    view = student.augmented(batch)
                    similar = cosines(query(student, view), self.keys)
                    picked = nearest(similar, self.top, self.batchwise)
                    with self.shown(picked):
                        logits = student.logits(view)
                    loss = new_class_loss(logits, batch["label"], experience.classes)
                    student.step(loss - self.key_weight * similar.gather(1, picked).sum(1).mean())

    @torch.no_grad()
    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The allowed class of largest logit, each record with the prompts that it picks itself."""
        student, allowed = self.student, self.student.allowed(batch)
        with evaluating(student.model):
            picked = nearest(cosines(query(student, batch), self.keys), self.top)
            with self.shown(picked):
                logits = student.logits(batch)
        return masked(logits, allowed).argmax(1)

    def shown(self, picked: Int[Tensor, "batch top"]) -> AbstractContextManager[None]:
        """The network as it sees the picked prompts, one after the other."""
        prompts = [part[picked] for part in self.prompts]
        if self.form == "tokens":
            return tokens(self.encoder, prompts[0].flatten(1, 2), self.read == "prompts")
        half = self.length // 2
        keys_values = [(part[:, :, :half].flatten(1, 2), part[:, :, half:].flatten(1, 2)) for part in prompts]
        return prefixes(self.encoder, dict(zip(self.blocks, keys_values, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The student's state, prompts among it."""
        return {"student": self.student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])


def nearest(
    similar: Float[Tensor, "batch pool"], top: int, batchwise: bool = False
) -> Int[Tensor, "batch top"]:
    """The keys of largest cosine, of each record or most often picked in the batch (the lower number at a tie)."""
    picked = similar.topk(top, dim=1).indices
    if not batchwise:
        return picked
    count = torch.bincount(picked.flatten(), minlength=similar.shape[1])
    return count.argsort(descending=True, stable=True)[:top].expand(len(similar), -1)
