"""Measurements for the claims of NAPA-VQ."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from palimpsest.retain.coding_vectors import distances, mixed
from palimpsest.retain.methods.napa_vq import NAPAVQ
from palimpsest.study.claims.learned import Learned, learned_measurement


@learned_measurement("napa-vq.base-accuracy")
def base_accuracy(learned: Learned) -> float:
    """Accuracy on the first task right after it."""
    return learned.finished.rows[0][0]


@learned_measurement("napa-vq.old-vectors-move")
def old_vectors_move(learned: Learned) -> float:
    """Largest change of the first task's coding vectors while the second is learned."""
    return _moves(learned)[0]


@learned_measurement("napa-vq.new-vectors-move")
def new_vectors_move(learned: Learned) -> float:
    """Smallest change, over labels, of the second task's coding vectors while it is learned."""
    return _moves(learned)[1]


@learned_measurement("napa-vq.edges-amiss")
def edges_amiss(learned: Learned) -> float:
    """Number of edges that are not symmetric, not 1 on the diagonal, or outside {0} and [0.17, 1]."""
    edges = _learner(learned).edges
    outside = (edges != 0) & ((edges < 0.17) | (edges > 1))
    return float((edges != edges.T).sum() + (edges.diagonal() != 1).sum() + outside.sum())


@learned_measurement("napa-vq.edges-missing")
def edges_missing(learned: Learned) -> float:
    """Share of edges that are 0 at the end."""
    return float((_learner(learned).edges == 0).float().mean())


@learned_measurement("napa-vq.margin-change")
def margin_change(learned: Learned) -> float:
    """Mean margin to the second vector of mixtures, minus that of the prototypes that they come from."""
    learner = _learner(learned)
    draws = torch.Generator().manual_seed(0)
    vectors, means = learner.vectors.detach(), learner.prototypes.means
    near = learner.edges > 0
    near.fill_diagonal_(False)
    roots = torch.nonzero(near.any(1)).flatten()
    others = torch.multinomial(near[roots].float().cpu(), 1, generator=draws).flatten().to(roots.device)
    gamma = 0.5 + 0.5 * torch.rand(len(roots), 1, generator=draws).to(means)
    mixtures = mixed(means[roots], means[others], gamma)
    return _margin(mixtures, vectors, roots) - _margin(means[roots], vectors, roots)


def _margin(features: Tensor, vectors: Tensor, labels: Tensor) -> float:
    """Mean distance to the nearest vector of another label, minus that to the own."""
    gaps = distances(features, vectors)
    own = gaps.gather(1, labels[:, None])[:, 0]
    return float((gaps.scatter(1, labels[:, None], float("inf")).amin(1) - own).mean())


def _moves(learned: Learned) -> tuple[float, float]:
    run = learned.fresh
    with run.runtime.limited():
        run.advance()
        learner = cast(NAPAVQ, run.learner)
        before = learner.vectors.detach().clone()
        run.advance()
    turns = 4 if learner.rotations else 1
    change = (learner.vectors.detach() - before).abs().amax(1).view(-1, turns).cpu()
    first, second = (list(run.stream[number].classes) for number in (0, 1))
    return float(change[first].max()), float(change[second].min())


def _learner(learned: Learned) -> NAPAVQ:
    return cast(NAPAVQ, learned.finished.learner)
