"""Label-agnostic forgetting: move the representations of forget records to where they are badly rebuilt."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch, NonFinite
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.activations import output_with_graph
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import step
from palimpsest.parts.vae import VAE, Output, fit_vae
from palimpsest.tasks.classification import Classification

log = logging.getLogger("palimpsest")
PAPER = Paper(
    "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models", "ICLR 2024", "2404.00506"
)
LARGEST = torch.finfo(torch.float32).max
SMALL_REACH = 0.05
"""Steps times learning rates below which hardly anything can change; the published runs have 0.3 to 1."""


@unlearner(
    "laf",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("classification",),
    paper=PAPER,
    search={
        "steps": Span(120, 960, integer=True),
        "lr_unlearning": Span(3e-5, 3e-4, log=True),
        "temperature": Span(1, 20, log=True),
    },
)
@dataclass(frozen=True)
class LAF:
    """Push the representations of forget records away and hold the others, without reading a label.

    Two small variational autoencoders learn what representations look like: one those of all training
    records, one those of the forget records, both of the original model. Then two steps in turn, each with
    its own Adam, on a batch of forget and a batch of retained records. Extractor unlearning (`unlearning_loss`)
    keeps retained records well rebuilt by the first autoencoder and makes forget records badly rebuilt by the
    second; representation alignment (`alignment_loss`) ties retained records to the original's
    representations and repels forget records from theirs. The head gets no gradient. Use it where labels are
    lost, wrong or must not be looked at; where some retained labels are at hand, "laf-r" repairs the head
    after it.

    The representation is what the head is given (`Task.features`, after a ReLU in most networks), or the
    output of any `layer` by name (the published one is the output of a linear layer before any ReLU, which
    none follows in its networks).

    What suits: the number of steps times the rates decides, not the epochs. The defaults are for small data:
    on the digits (small CNN) they leave next to nothing of a class and cost the others one to three points. Published are
    `epochs` 20 with rates 5e-5 and 1e-4 on MNIST, 40 with 1e-5 and 4e-5 (a class: 5e-5) on CIFAR-10, which is
    6000 steps and more, with T = 20 (random records on MNIST: 5) and 8 or 16 latent numbers; steps and rates
    that cannot move anything are warned of. With the sigmoid decoder keep `lr_alignment` well above
    `lr_unlearning`: 3e-4 against 1e-3 destroys the model. A linear decoder, which can rebuild what does not
    lie between 0 and 1, bears equal rates (5e-4 each, T = 20). The lower T, the stronger the push: at 1 the
    others go along. A class may survive the push, where the head maps the place that it was pushed to to the
    same class again (T = 5 or 20 with few steps): more steps, a lower T or the repair help.

    Random records of all classes are known from the others of their kind, and stay known: with the defaults
    accuracy moves by a point or less everywhere, as in a retrained model, and their representations little
    more than those of retained records, so an audit may see nothing forgotten. T = 2 and `lr_alignment` 2e-3
    do push them away, at a price (accuracy 0.6 to 0.7 on them, 0.8 to 0.9 on retained records).

    Deviations: representations of the original are computed once, not anew in every epoch of the
    autoencoders (the same where data are not augmented at random), and held in memory, records x dim.
    The number of steps is a setting, whatever the size of the request (`epochs` is the published count).
    Evaluation mode throughout, as published: batch-norm statistics stay.

    Attributes:
        steps: Pairs of steps, one of each kind.
        epochs: Passes instead of `steps`; a pass ends with the shorter of forget and retained batches.
        lr_unlearning: Learning rate of extractor unlearning; 0 leaves it out (an ablation).
        lr_alignment: Learning rate of representation alignment; 0 leaves it out (an ablation).
        temperature: T of the forget records in the alignment, above 0.
        batch_size: Records of each kind per step, and of the autoencoders.
        layer: Module whose output is the representation; None takes the input of the head.
        decoder: Output of the autoencoders: "sigmoid" (published) or "linear".
        latent: Width of their latent vector.
        vae_epochs: Passes of their training.
        vae_lr: Learning rate of their training.
    """

    steps: int = 480
    epochs: int | None = None
    lr_unlearning: float = 1e-4
    lr_alignment: float = 1e-3
    temperature: float = 3.0
    batch_size: int = 32
    layer: str | None = None
    decoder: Output = "sigmoid"
    latent: int = 8
    vae_epochs: int = 10
    vae_lr: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "latent", "vae_epochs"):
            check_range(name, getattr(self, name), 1, float("inf"))
        if self.epochs is not None:
            check_range("epochs", self.epochs, 1, float("inf"))
        for name in ("temperature", "vae_lr"):
            check_range(name, getattr(self, name), 0, LARGEST, open_low=True)
        for name in ("lr_unlearning", "lr_alignment"):
            check_range(name, getattr(self, name), 0, LARGEST)
        if self.lr_unlearning == self.lr_alignment == 0:
            raise InvalidHyperparameter(
                "Of lr_unlearning and lr_alignment only one can be 0: nothing would move."
            )
        if self.decoder not in ("sigmoid", "linear"):
            raise InvalidHyperparameter(f"decoder must be 'sigmoid' or 'linear', not {self.decoder!r}.")

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """The student after the last step; no label is read.

        Raises:
            MissingNeed: If the retained records are not at hand.
            UnknownName, ModelMismatch: If there is no representation, or nothing that trains feeds it.
            NonFinite, NonFiniteLoss: If representations hold NaN or Inf, or a loss becomes so.
        """
        if split.retain is None:
            raise MissingNeed("LAF needs the retained records, or a sample of them; labels are not needed.")
        forget, retain = split.forget.without(task.label), split.retain.without(task.label)
        student = runtime.place(copy.deepcopy(model)).eval()
        teacher = runtime.place(copy.deepcopy(model)).eval().requires_grad_(False)
        parameters = list(trainable(student).values())
        self._check_representation(student, forget, task, runtime)
        whole_vae, forget_vae = self._model_representations(teacher, forget, retain, task, runtime)

        unlearning = torch.optim.Adam(parameters, self.lr_unlearning)
        alignment = torch.optim.Adam(parameters, self.lr_alignment)
        steps = self._steps(forget, retain)
        pairs = islice(self._pairs(forget, retain, task, runtime), steps)
        with runtime.seeded("laf"):
            for gone, kept in runtime.track(pairs, "laf", total=steps):
                if self.lr_unlearning > 0:
                    e_kept, e_gone = self._represent(student, kept, gone, task)
                    loss = unlearning_loss(e_kept, whole_vae(e_kept)[0], e_gone, forget_vae(e_gone)[0])
                    step(student, unlearning, loss, gone)
                if self.lr_alignment > 0:
                    e_kept, e_gone = self._represent(student, kept, gone, task)
                    with torch.no_grad():
                        t_kept, t_gone = self._represent(teacher, kept, gone, task)
                    loss = alignment_loss(e_kept, t_kept, e_gone, t_gone, self.temperature)
                    step(student, alignment, loss, gone)
        return student

    def _represent(
        self, model: nn.Module, kept: Batch, gone: Batch, task: Classification
    ) -> tuple[Float[Tensor, "kept dim"], Float[Tensor, "gone dim"]]:
        return representation(model, kept, task, self.layer), representation(model, gone, task, self.layer)

    def _check_representation(
        self, student: nn.Module, records: Records, task: Classification, runtime: Runtime
    ) -> None:
        found = representation(
            student, next(runtime.batches(records, task, self.batch_size)), task, self.layer
        )
        if not found.requires_grad:
            raise ModelMismatch(
                "No trainable parameter feeds the representation: nothing would be forgotten."
            )

    def _model_representations(
        self, teacher: nn.Module, forget: Records, retain: Records, task: Classification, runtime: Runtime
    ) -> tuple[VAE, VAE]:
        """Autoencoders of the original's representations: of all training records, of the forget records."""
        fitted: list[VAE] = []
        gone, kept = (representations(teacher, part, task, runtime, self.layer) for part in (forget, retain))
        for name, vectors in (("whole", torch.cat([gone, kept])), ("forget", gone)):
            if not torch.isfinite(vectors).all():
                raise NonFinite("Representations hold NaN or Inf.")
            if not vectors.any():
                raise ModelMismatch("All representations are zero: they have no direction to be moved from.")
            order = runtime.generator(f"laf {name} autoencoder order")
            with runtime.seeded(f"laf {name} autoencoder"):
                vae = fit_vae(
                    vectors, order, self.latent, self.decoder, self.vae_epochs, self.vae_lr, self.batch_size
                )
            fitted.append(vae)
        return fitted[0], fitted[1]

    def _steps(self, forget: Records, retain: Records) -> int:
        """Number of pairs of steps; warns if they cannot get anywhere."""
        shorter = -(-min(len(forget), len(retain)) // self.batch_size)
        steps = self.steps if self.epochs is None else self.epochs * shorter
        reach = steps * (self.lr_unlearning + self.lr_alignment)
        if reach < SMALL_REACH:
            log.warning(
                "laf: %d steps at rates of %g and %g move a weight by at most %.2g, too little to forget "
                "anything; raise steps, epochs or the rates.",
                *(steps, self.lr_unlearning, self.lr_alignment, reach),
            )
        return steps

    def _pairs(
        self, forget: Records, retain: Records, task: Classification, runtime: Runtime
    ) -> Iterator[tuple[Batch, Batch]]:
        """Pairs (forget batch, retained batch) without end; an epoch stops with the shorter of the two."""
        order = runtime.generator("laf order")
        while True:
            yield from zip(
                runtime.batches(forget, task, self.batch_size, shuffle=order),
                runtime.batches(retain, task, self.batch_size, shuffle=order),
                strict=False,
            )


def representation(
    model: nn.Module, batch: Batch, task: Classification, layer: str | None = None
) -> Float[Tensor, "batch dim"]:
    """What the head is given (`task.features`), or the output of a named layer, with its graph."""
    if layer is None:
        return task.features(model, batch)
    return output_with_graph(model, lambda: task.logits(model, batch), layer)


@torch.no_grad()
def representations(
    model: nn.Module, records: Records, task: Classification, runtime: Runtime, layer: str | None = None
) -> Float[Tensor, "records dim"]:
    """The same for all records in order, without graph."""
    return torch.cat([representation(model, b, task, layer) for b in runtime.batches(records, task)])


def squashed_error(
    representations: Float[Tensor, "batch dim"], reconstructions: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Sum over records of exp(d / (d + 1)), d the squared distance of a representation from its reconstruction.

    Every record counts between 1 (rebuilt exactly) and e, however badly it is rebuilt.
    """
    distance = (reconstructions - representations).square().sum(1)
    return (1 - 1 / (distance + 1)).exp().sum()


def unlearning_loss(
    retain: Float[Tensor, "kept dim"],
    retain_reconstruction: Float[Tensor, "kept dim"],
    forget: Float[Tensor, "gone dim"],
    forget_reconstruction: Float[Tensor, "gone dim"],
) -> Float[Tensor, ""]:
    """L_UE: the squashed errors of retained records minus those of forget records."""
    return squashed_error(retain, retain_reconstruction) - squashed_error(forget, forget_reconstruction)


def alignment_loss(
    retain: Float[Tensor, "kept dim"],
    retain_teacher: Float[Tensor, "kept dim"],
    forget: Float[Tensor, "gone dim"],
    forget_teacher: Float[Tensor, "gone dim"],
    temperature: float = 20.0,
) -> Float[Tensor, ""]:
    """L_RA: sum_i log(exp(c_i) / sum_j exp(q_j / T)), of cosine distances from the original's representations.

    c_i = 1 - cos(student, teacher) of retained record i, q_j the same of forget record j: descending it
    pulls retained records to where they were and pushes forget records away. It is a ratio of distances,
    not of similarities. A representation of zeros has the distance 1 from anything.

    Args:
        retain: Representations of retained records.
        retain_teacher: By the original.
        forget: Representations of forget records.
        forget_teacher: By the original.
        temperature: T, above 0, of the forget records only.
    """
    pushed = (cosine_distance(forget, forget_teacher) / temperature).logsumexp(0)
    return (cosine_distance(retain, retain_teacher) - pushed).sum()


def cosine_distance(
    one: Float[Tensor, "batch dim"], two: Float[Tensor, "batch dim"]
) -> Float[Tensor, " batch"]:
    """1 - cos of every row, safe for rows of zeros."""
    same = torch.ones(len(one), device=one.device)
    return F.cosine_embedding_loss(one, two, same, reduction="none")
