"""Measurements for the claims of rehearsal-free continual learning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from palimpsest.parts.activations import head_name
from palimpsest.parts.attention import query_key_value
from palimpsest.retain.following import Followed, follow, layer_similarity
from palimpsest.study.claims.learned import Learned, Measurement, learned_measurement


def _followed(learned: Learned) -> Followed:
    """The run at its end with what was seen on the way; learned once for all measurements."""
    found: Followed | None = getattr(learned, "followed", None)
    if found is None:
        found = follow(learned.fresh)
        setattr(learned, "followed", found)  # noqa: B010
    return found


def _figure(name: str) -> Callable[[Measurement], Measurement]:
    return learned_measurement(f"rehearsal-free.{name}")


@_figure("global-forgetting")
def global_forgetting(learned: Learned) -> float:
    """F^G: answers among the classes of a task and those before it."""
    return _followed(learned).figures()["global forgetting"]


@_figure("local-forgetting")
def local_forgetting(learned: Learned) -> float:
    """F^L: answers among a task's own classes."""
    return _followed(learned).figures()["local forgetting"]


@_figure("forgetting-by-steps")
def forgetting_by_steps(learned: Learned) -> float:
    """As the CODA-Prompt repository measures it."""
    return _followed(learned).figures()["forgetting by steps"]


@_figure("early-over-late-cka")
def early_over_late(learned: Learned) -> float:
    """CKA of the first layer minus that of the last before the head, after the first task against the end."""
    figures = _followed(learned).figures()
    return figures["CKA of the first layer"] - figures["CKA of the last layer"]


@_figure("cka-with-itself")
def cka_with_itself(learned: Learned) -> float:
    """Largest distance of a layer's CKA with itself from 1."""
    run = learned.finished
    model = run.learner.student.model
    same = layer_similarity(model, model, run.stream[0].test, run.task, run.runtime)
    return max(abs(value - 1) for value in same.values())


@_figure("others-moved")
def others_moved(learned: Learned) -> float:
    """Largest change, over the stream, of a parameter that is no query, key or value projection and not the head's."""
    return max((_largest(gap) for gap in _changes(learned, inside=False)), default=0.0)


@_figure("projections-moved")
def projections_moved(learned: Learned) -> float:
    """Euclidean distance of the query, key and value projections from where they began."""
    return float(sum((gap.square().sum() for gap in _changes(learned, inside=True)), torch.zeros(())).sqrt())


def _changes(learned: Learned, inside: bool) -> list[Tensor]:
    """Differences of the parameters without the head: the projections, or all but them."""
    before = dict(learned.fresh.learner.student.model.named_parameters())
    model = learned.finished.learner.student.model
    chosen, head = set(query_key_value(model)), head_name(model)
    return [
        parameter.detach() - before[name].detach()
        for name, parameter in model.named_parameters()
        if (name in chosen) == inside and not name.startswith(f"{head}.")
    ]


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
