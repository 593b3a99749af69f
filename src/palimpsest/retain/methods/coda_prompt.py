"""CODA-Prompt: prompts are sums of components, weighed by how near their keys are to the part they attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice
from palimpsest.core.unlearner import Paper
from palimpsest.retain.attention_blocks import prefixes
from palimpsest.retain.heads import masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.prompting import (
    PUBLISHED_DEPTH,
    anneal,
    check_blocks,
    check_kept_optimizer,
    check_prefix,
    check_tasks,
    check_weight,
    frozen,
    halves,
    new_class_loss,
    only_trains,
    query,
    query_width,
)
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student

PARTS = ("components", "keys", "attention")


@learner(
    "coda-prompt",
    keeps={Keeps.PRETRAINED, Keeps.BOUNDARIES},
    paper=Paper(
        "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning",
        "CVPR 2023",
        "2211.13218",
    ),
    search={"orthogonality": Choice((0.0, 0.01, 0.1, 1.0))},
)
@dataclass(eq=False)
class CodaPrompt:
    """Prompts assembled from components that grow with the experiences; the network is frozen.

    The network stays as it was pretrained, in evaluation mode also while learning; the experience's components,
    keys and attention vectors train, and the head. In every prompted block, with q the class token without
    prompts, weight_k = cos(q * A_k, K_k) and the prompt is sum_k weight_k P_k, its first half further keys and its
    second half values of the attention, after its projections. The pool is split evenly over `tasks`; an
    experience begins its share orthonormal to each other and to all that came before, which then never moves,
    whatever the optimiser. L = CE(classes of the experience) + orthogonality * sum over blocks and P, K, A of
    mean((M M^T - I)^2), M the rows so far. No task id is used. The published code draws new rows
    orthogonal one after the other to old ones that training has turned; here they are orthogonal to the whole
    span of the old ones.

    Attributes:
        tasks: Experiences that the pool is split over.
        pool: Components, of which each experience gets pool // tasks; at most as many as a query has numbers.
        length: Rows of a component.
        blocks: Where prompts stand; the first five by default, or as many as there are.
        orthogonality: 0 as released; the paper has 0.1.
        annealed: Cosine schedule of the lr over the epochs of an experience.
    """

    tasks: int = 10
    pool: int = 100
    length: int = 8
    blocks: Sequence[int] | None = None
    orthogonality: float = 0.0
    annealed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.tasks <= self.pool:
            raise InvalidHyperparameter(
                f"Every one of the tasks needs a component of the pool: tasks={self.tasks}, pool={self.pool}."
            )
        check_prefix("length", self.length)
        check_weight("orthogonality", self.orthogonality)
        if self.blocks is not None and not self.blocks:
            raise InvalidHyperparameter("blocks must name at least one block.")

    def begin(self, student: Student) -> None:
        """Freeze a fresh student's network and make room for components.

        Raises:
            ModelMismatch: If the network is no vision transformer.
            InvalidHyperparameter: If it has no such block, the pool is too large to be orthogonal, or the
                optimiser is to be kept.
        """
        check_kept_optimizer(student)
        self.student, self.encoder = student, frozen(student)
        default = range(min(PUBLISHED_DEPTH, len(self.encoder)))
        self.places = check_blocks("blocks", default if self.blocks is None else self.blocks, self.encoder)
        width, keys = self.encoder.attentions[0].width, query_width(student)
        share = self.pool // self.tasks
        if share * self.tasks > min(keys, self.length * width):
            raise InvalidHyperparameter(
                f"{share * self.tasks} components cannot be orthogonal in {min(keys, self.length * width)} "
                "dimensions of the network's features: take a smaller pool."
            )
        shapes = {"components": (self.length, width), "keys": (keys,), "attention": (keys,)}
        self.parts: dict[str, nn.ParameterList] = {}
        for name in PARTS:
            size = (len(self.places), share, *shapes[name])
            made = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(self.tasks))
            self.parts[name] = made
            student.attach(name, made)

    def observe(self, experience: Experience) -> None:
        """Begin the experience's components, and fit them and the head.

        Raises:
            InvalidStream: If there are more experiences than tasks.
        """
        student, index = self.student, experience.index
        check_tasks(index, self.tasks)
        self._start(index)
        with student.learning(experience):
            student.model.eval()
            for epoch in student.epochs():
                anneal(student, epoch, self.annealed)
                for batch in student.batches(experience.records):
                    view = student.augmented(batch)
                    with self.shown(query(student, view)):
                        logits = student.logits(view)
                    loss = new_class_loss(logits, batch["label"], experience.classes)
                    if self.orthogonality:
                        rows = [self.so_far(name).flatten(2) for name in PARTS]
                        loss = loss + self.orthogonality * sum(map(off_orthonormal, rows))
                    student.step(loss)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The allowed class of largest logit, with the components of all experiences met."""
        student, allowed = self.student, self.student.allowed(batch)
        with evaluating(student.model), self.shown(query(student, batch)):
            logits = student.logits(batch)
        return masked(logits, allowed).argmax(1)

    def shown(self, queries: Float[Tensor, "batch dim"]) -> AbstractContextManager[None]:
        """The network as it sees the prompts of some queries."""
        components, keys, attention = map(self.so_far, PARTS)
        prompts = [
            torch.einsum("bk,kld->bld", component_weights(queries, a, k), p)
            for p, k, a in zip(components, keys, attention, strict=True)
        ]
        return prefixes(self.encoder, dict(zip(self.places, map(halves, prompts), strict=True)))

    def so_far(self, name: str) -> Float[Tensor, "blocks rows ..."]:
        """Components, keys or attention vectors of all experiences met, by block."""
        return torch.cat(list(self.parts[name])[: self.student.experiences], 1)

    def state_dict(self) -> dict[str, Any]:
        """The student's state, components among it."""
        return {"student": self.student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])

    @torch.no_grad()
    def _start(self, index: int) -> None:
        """Orthonormal rows for an experience; those of the others do not train."""
        for name, parts in self.parts.items():
            only_trains(parts, index)
            random = self.student.runtime.generator(name, index)
            for block in range(len(self.places)):
                old = [part[block].flatten(1) for part in list(parts)[:index]]
                share = parts[index][block].flatten(1)
                known = torch.cat(old) if old else share[:0]
                parts[index][block] = fresh_rows(known, len(share), random).view_as(parts[index][block])


def component_weights(
    queries: Float[Tensor, "batch dim"],
    attention: Float[Tensor, "components dim"],
    keys: Float[Tensor, "components dim"],
) -> Float[Tensor, "batch components"]:
    """cos(q * A_k, K_k) of every query and component."""
    attended = F.normalize(queries[:, None] * attention, dim=2)
    return torch.einsum("bkd,kd->bk", attended, F.normalize(keys, dim=1))


def off_orthonormal(rows: Float[Tensor, "blocks rows dim"]) -> Float[Tensor, ""]:
    """Mean over pairs of rows of (M M^T - I)^2, summed over blocks."""
    gram = rows @ rows.transpose(1, 2)
    return ((gram - torch.eye(rows.shape[1]).to(rows)) ** 2).mean((1, 2)).sum()


def fresh_rows(
    old: Float[Tensor, "old dim"], count: int, random: torch.Generator
) -> Float[Tensor, "count dim"]:
    """Random rows, orthonormal to each other and orthogonal to the span of old ones, by Gram-Schmidt.

    Every row is freed of those before it twice, since once is not exact in floating point.
    """
    basis = torch.zeros(0, old.shape[1], dtype=torch.float64)
    drawn = torch.randn(count, old.shape[1], generator=random, dtype=torch.float64)
    for row in torch.cat([old.detach().cpu().double(), drawn]):
        length = row.norm()
        for _ in range(2):
            row = row - basis.T @ (basis @ row)
        if row.norm() > 1e-9 * length:  # an old row that others span adds nothing
            basis = torch.cat([basis, row[None] / row.norm()])
    return basis[-count:].to(old)
