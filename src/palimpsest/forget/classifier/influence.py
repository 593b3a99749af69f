"""Influence unlearning: one Newton-like step away from the forget set, with a WoodFisher recursion."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.gradients import Direction, gradient_of, mean_gradient
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import differentiable_twice


@unlearner(
    "influence",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=Paper("Model Sparsity Can Simplify Machine Unlearning", "NeurIPS 2023", "2304.04934"),
    search={"alpha": Span(0.1, 30, log=True)},
)
@dataclass(frozen=True)
class Influence:
    """Add alpha times an approximate inverse Fisher matrix times the forget gradient; no training.

    The direction is v = (n_f / n) * (mean forget gradient - mean retained gradient), n = n_f + n_r, in
    evaluation mode, preconditioned by `woodfisher`. The published recursion that is reproduced here never
    takes in a new gradient after the first retained record, so the step is v but for a correction along
    that one gradient. One step of a linear approximation: use it for small forget sets, and search alpha,
    since a step too long destroys the model and one too short does nothing.

    Attributes:
        alpha: Length of the step, at least 0; to be searched, of the order of 1 to 100. It must grow as the
            original fits its training data better, because the gradients shrink: on the digits 1 forgets a
            class after 20 epochs of training, 2 to 3 after 40.
        samples: N of the recursion, its damping as well as its length: after the first retained record (in
            the order of the split, not shuffled) at most N + 1 further ones are read.
    """

    alpha: float = 1.0
    samples: int = 1000

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, float("inf"))
        check_range("samples", self.samples, 1, float("inf"))

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model after the step."""
        if split.retain is None:
            raise MissingNeed("Influence unlearning needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        forget = mean_gradient(student, runtime.batches(split.forget, task), task)
        retain = mean_gradient(student, runtime.batches(split.retain, task), task)
        share = len(split.forget) / (len(split.forget) + len(split.retain))
        v = {name: share * (forget[name] - retain[name]) for name in forget}
        batches = runtime.batches(split.retain, task)
        k = woodfisher(student, batches, task, v, self.samples)
        with torch.no_grad():
            for name, parameter in trainable(student).items():
                parameter.add_(k[name], alpha=self.alpha)
        return student


def woodfisher(
    model: nn.Module, batches: Iterable[Batch], task: Task, v: Direction, samples: int = 1000
) -> Direction:
    """The published recursion for (inverse Fisher matrix) v over the gradients g_1, g_2, ... of single records.

    It starts with k = v and o = g_1. Every further g, at most N + 1 of them, gives t = o.g,
    k <- k - (k.g) / (N + t) * o and o <- o - t / (N + t) * o.

    As o never leaves the direction of g_1, and k leaves v only along it, two numbers describe both:
    o = s g_1 and k = v + c g_1. So all that is needed of a record is how its loss changes along g_1 and
    along v, which `slopes` gives for a whole batch; no gradient of a single record but the first is ever
    formed.

    Args:
        model: The network; not changed.
        batches: Records in the order of the recursion; read no further than needed.
        task: Whose `loss_per_example` is differentiated.
        v: To be multiplied.
        samples: N.
    """
    first: Direction | None = None
    along_first: list[float] = []
    along_v: list[float] = []
    with evaluating(model):
        for batch in batches:
            if first is None:
                first = gradient_of(task.loss_per_example(model, batch)[0], trainable(model))
            along_first += slopes(model, batch, task, first).tolist()
            along_v += slopes(model, batch, task, v).tolist()
            if len(along_v) >= samples + 2:
                break
    if first is None:
        raise MissingNeed("Influence unlearning needs at least one retained record.")
    s, c = 1.0, 0.0
    for first_g, v_g in zip(along_first[1 : samples + 2], along_v[1 : samples + 2], strict=True):
        t = s * first_g
        c -= (v_g + c * first_g) / (samples + t) * s
        s -= t / (samples + t) * s
    return {name: v[name] + c * first[name] for name in v}


def slopes(model: nn.Module, batch: Batch, task: Task, direction: Direction) -> Float[Tensor, " batch"]:
    """Derivative of every record's loss along a direction: the dot product with its gradient, [batch].

    The gradient of the weighted sum of losses is linear in the weights; deriving its dot product with the
    direction by the weights gives all records' products in one double backward pass.
    """
    parameters = trainable(model)
    with differentiable_twice():
        losses = task.loss_per_example(model, batch)
    weights = torch.ones_like(losses, requires_grad=True)
    found = torch.autograd.grad(
        losses,
        list(parameters.values()),
        weights,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    products = [(gradient * direction[name]).sum() for name, gradient in zip(parameters, found, strict=True)]
    return torch.autograd.grad(torch.stack(products).sum(), weights)[0].double()
