"""Coding vectors and their neighbours: a class per vector, edges between those that are near each other."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def distances(
    features: Float[Tensor, "records dim"], vectors: Float[Tensor, "labels dim"]
) -> Float[Tensor, "records labels"]:
    """Euclidean distances, not squared."""
    return torch.cdist(features, vectors, compute_mode="donot_use_mm_for_euclid_dist")


def distance_cross_entropy(
    gaps: Float[Tensor, "records labels"], labels: Int[Tensor, " records"], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of -distance / T."""
    return F.cross_entropy(-gaps / temperature, labels)


def updated_edges(
    edges: Float[Tensor, "labels labels"],
    gaps: Float[Tensor, "records labels"],
    neighbours: int = 15,
    decay: float = 0.9,
) -> Float[Tensor, "labels labels"]:
    """Edges after a batch, not yet symmetric.

    Of every record the nearest vector wins, and its edge to each of the k nearest is set to 1. The edge from a
    vector is multiplied by the decay once for each record that it won without the other being near. What is below
    decay^10 becomes 0.
    """
    nearest = gaps.topk(min(neighbours, gaps.shape[1]), largest=False).indices
    near = torch.zeros_like(gaps).scatter_(1, nearest, 1.0)
    together = torch.zeros_like(edges).index_add_(0, nearest[:, 0], near.to(edges))
    won = torch.bincount(nearest[:, 0], minlength=len(edges)).to(edges)
    edges = torch.where(together > 0, 1.0, edges)
    missed = (won[:, None] - together).clamp_min(0).double()
    edges = (edges * decay**missed).to(edges)
    return torch.where(edges < torch.tensor(decay**10).to(edges), 0.0, edges)


def neighbourhood_loss(
    gaps: Float[Tensor, "records labels"],
    labels: Int[Tensor, " records"],
    near: Bool[Tensor, "labels labels"],
    weight_scale: float = 0.001,
) -> Float[Tensor, ""]:
    """Mean of relu(d_own - sum_j w_j d_j), squared distances, j over the neighbours of the own label without it.

    w_j is proportional to exp(-scale d_j), sums to 1, and has no gradient; without neighbours the sum is 0.
    """
    squared = gaps.square()
    own = F.one_hot(labels, gaps.shape[1]).bool()
    others = near[labels] & ~own
    weights = (
        (-weight_scale * squared.detach()).masked_fill(~others, float("-inf")).softmax(1).nan_to_num(0.0)
    )
    return F.relu(squared[own] - (weights * squared).sum(1)).mean()


def mixed(
    roots: Float[Tensor, "mixed dim"], others: Float[Tensor, "mixed dim"], gamma: Float[Tensor, "mixed 1"]
) -> Float[Tensor, "mixed dim"]:
    """Gamma times one prototype plus (1 - gamma) times another."""
    return gamma * roots + (1 - gamma) * others
