"""Measurements for the claims of rehearsal-free continual learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.parts.activations import head_name
from palimpsest.parts.attention import query_key_value
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.retain.following import Followed, follow, layer_similarity
from palimpsest.retain.learner import Learner
from palimpsest.retain.methods.rehearsal_free import RehearsalFree
from palimpsest.retain.running import Run
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


@_figure("cost-saved")
def cost_saved(learned: Learned) -> float:
    """How much less L2 costs from pretrained weights than from fresh ones.

    Its cost is the accuracy on new tasks right after them, all but the first, without it minus with it.
    """
    pretrained = learned.fresh.learner.student.model
    fresh = reinitialised(pretrained, learned.fresh.runtime)
    return _cost(learned, fresh, False) - _cost(learned, pretrained, True)


def _cost(learned: Learned, model: nn.Module, pretrained: bool) -> float:
    """What the L2 of a learner costs from a network; only a pretrained one is an anchor of the first task."""
    found: list[float] = []
    for strength in (0.0, cast(RehearsalFree, learned.fresh.learner).l2):
        made = learned.fresh
        learner = replace(cast(RehearsalFree, made.learner), l2=strength, pretrained=pretrained)
        run = Run(cast(Learner, learner), made.stream, model, made.task, made.training, made.runtime)
        with run.runtime.limited():
            while not run.finished:
                run.advance()
        found.append(float(np.mean(np.diagonal(np.asarray(run.rows))[1:])))
    return found[0] - found[1]


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
