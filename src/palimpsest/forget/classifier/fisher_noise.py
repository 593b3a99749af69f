"""Fisher forgetting: add noise to the weights where the retained records do not need precision."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.importance import Importance
from palimpsest.parts.parameters import trainable, unwrapped
from palimpsest.parts.training import differentiable_twice
from palimpsest.tasks.classification import Classification

PRECISION_FLOOR = 1e-8
"""Added to the Fisher information before it is inverted, and to empirical gradients before squaring."""
LARGEST_VARIANCE, LARGEST_HEAD_VARIANCE = 1e3, 1e2
"""Of the inverse Fisher information, before it is multiplied by alpha."""
FORGOTTEN_ROW_VARIANCE = 1e-4
BOOST = 10.0
LARGEST_EMPIRICAL_DEVIATION = 1e-3


@unlearner(
    "fisher-noise",
    needs={Need.MODEL, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=Paper(
        "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        "CVPR 2020",
        "1911.04933",
    ),
    search={"alpha": Span(1e-9, 1e-5, log=True)},
)
@dataclass(frozen=True)
class FisherNoise:
    """Gaussian noise on every weight, stronger where the Fisher information of the retained data is small.

    Two variants. "expected" (the authors' own) takes the expectation over the model's answers, sum over y
    of p(y|x) times the squared gradient of log p(y|x), record by record (published code squares gradients
    of batches of 32 in one version), and the noise of `noise_distribution`; when whole classes go, their
    rows of the head are drawn anew around 0. "empirical" (a simple re-implementation) takes the true
    labels only, and deviations min(sqrt(alpha / F), 1e-3). Needs the retained records only.

    Because the noise does not depend on the forget records, it costs accuracy on all of them: search alpha.

    Attributes:
        alpha: Scale of the variance, at least 0; published 1e-6, searched from 1e-7 to 3e-6. With 0 nothing
            changes but the head's rows of forgotten classes.
        variant: "expected" or "empirical".
        reset_rows: Whether "expected" draws the head's rows of wholly forgotten classes anew.
        chunk: Records whose gradients are held in memory at once.
    """

    alpha: float = 1e-7
    variant: Literal["expected", "empirical"] = "expected"
    reset_rows: bool = True
    chunk: int = 32

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, float("inf"))
        check_range("chunk", self.chunk, 1, float("inf"))
        if self.variant not in ("expected", "empirical"):
            raise InvalidHyperparameter(f"variant must be 'expected' or 'empirical', not {self.variant!r}.")

    @property
    def supplies(self) -> frozenset[Need]:
        """The expectation over the model's own answers needs no labels."""
        return frozenset({Need.RETAIN_LABELS} if self.variant == "expected" else ())

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """A copy of the model with noise on its trainable parameters."""
        if split.retain is None:
            raise MissingNeed("Fisher forgetting needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        batches = runtime.batches(split.retain, task, self.chunk)
        fisher = per_sample_fisher(student, batches, task, self.variant)
        classes = class_count(student, split, task, runtime)
        forgotten = [int(label) for label in split.forgotten_labels] if self.reset_rows else []
        random = runtime.generator("fisher noise")
        with torch.no_grad():
            for name, parameter in trainable(student).items():
                noise = torch.randn(parameter.shape, generator=random).to(parameter)
                if self.variant == "expected":
                    mean, variance = noise_distribution(
                        parameter, fisher[name], self.alpha, classes, forgotten
                    )
                    parameter.copy_(mean + variance.sqrt() * noise)
                else:
                    parameter.add_(empirical_deviation(fisher[name], self.alpha) * noise)
        return student


def noise_distribution(
    parameter: Tensor, fisher: Tensor, alpha: float, classes: int, forgotten: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a parameter tensor's new values, each of its shape.

    The variance is alpha * min(1 / (F + 1e-8), 1e3), the cap being 1e2 for the head; tensors of two or
    more dimensions share the average over dimension 1 (all inputs of a unit). The rows of forgotten
    classes in the head get mean 0 and variance 1e-4. Last, the head and one-dimensional tensors (biases,
    batch norm) get ten times the variance, once. As in the published code, "the head" is every tensor
    whose first dimension is the number of classes, so a hidden layer of that width counts as well.

    Args:
        parameter: Trained values.
        fisher: Information, of the same shape.
        alpha: Scale.
        classes: Number of classes.
        forgotten: Classes forgotten as a whole.
    """
    is_head = parameter.dim() > 0 and parameter.shape[0] == classes
    cap = LARGEST_HEAD_VARIANCE if is_head else LARGEST_VARIANCE
    mean = parameter.detach().clone()
    variance = alpha * (1 / (fisher + PRECISION_FLOOR)).clamp(max=cap)
    if parameter.dim() > 1:
        variance = variance.mean(1, keepdim=True).expand_as(parameter).clone()
    if is_head and forgotten:
        rows = torch.as_tensor(list(forgotten), device=mean.device)
        mean[rows] = 0
        variance[rows] = FORGOTTEN_ROW_VARIANCE
    if is_head or parameter.dim() == 1:
        variance = variance * BOOST
    return mean, variance


def empirical_deviation(fisher: Tensor, alpha: float) -> Tensor:
    """Standard deviation min(sqrt(alpha / F), 1e-3) of the simple variant."""
    return (alpha / fisher).sqrt().clamp(max=LARGEST_EMPIRICAL_DEVIATION)


def per_sample_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Classification,
    variant: Literal["expected", "empirical"] = "expected",
) -> Importance:
    """Diagonal Fisher information of the trainable parameters, mean over records, in evaluation mode.

    "expected": sum over classes y of p(y|x) (d log p(y|x) / d theta) squared. "empirical": for the true
    label y only, (d log p(y|x) / d theta + 1e-8) squared, where the small number, inside the square as in
    the published code, keeps the result above 0. Gradients of one batch are held in memory at a time.
    """
    inner = unwrapped(model)
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    fixed = {name: p.detach() for name, p in inner.named_parameters() if not p.requires_grad}
    fixed |= dict(inner.named_buffers())

    def log_probability(given: dict[str, Tensor], example: Batch, label: Tensor) -> tuple[Tensor, Tensor]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(inner, (given, fixed), args, kwargs)

        single = {key: value.unsqueeze(0) for key, value in example.items()}
        value = task.logits(cast(nn.Module, run), single)[0].log_softmax(-1).gather(0, label)
        return value, value.detach()

    gradients = vmap(grad(log_probability, has_aux=True), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    with evaluating(model), torch.no_grad(), differentiable_twice():
        for batch in batches:
            tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
            count += len(batch["id"])
            if variant == "empirical":
                gradient, _ = gradients(parameters, tensors, batch[task.label].long())
                for name, value in gradient.items():
                    total[name] += ((value + PRECISION_FLOOR) ** 2).sum(0)
                continue
            for label in range(task.logits(model, batch).shape[1]):
                asked = torch.full((len(batch["id"]),), label, device=batch[task.input].device)
                gradient, log_p = gradients(parameters, tensors, asked)
                for name, value in gradient.items():
                    total[name] += torch.tensordot(log_p.exp(), value**2, dims=1)
    return {name: value / max(count, 1) for name, value in total.items()}


@torch.no_grad()
def class_count(model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime) -> int:
    """Number of logits."""
    with evaluating(model):
        return task.logits(model, next(runtime.batches(split.forget, task, 1))).shape[1]
