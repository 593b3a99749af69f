"""Which functions of the library compute the reference values of NAPA-VQ."""

from __future__ import annotations

from typing import Any

import torch

from palimpsest.retain.coding_vectors import (
    distance_cross_entropy,
    distances,
    neighbourhood_loss,
    updated_edges,
)

Data = dict[str, Any]


def _neighbourhood(inputs: Data, params: Data) -> Data:
    start = torch.tensor(inputs["cvs"])
    given = inputs.get("initial_edges", "identity matrix")
    edges = torch.eye(len(start)) if isinstance(given, str) else torch.tensor(given)
    found = []
    for batch in inputs["batches"]:
        vectors, x = start.clone().requires_grad_(), torch.tensor(batch["x"]).requires_grad_()
        gaps = distances(x, vectors)
        edges = updated_edges(edges, gaps.detach(), params["k"], params["decay"])
        loss = neighbourhood_loss(gaps, torch.tensor(batch["labels"]), edges > 0, params["weight_scale"])
        by_x, by_vector = torch.autograd.grad(loss, [x, vectors])
        edges = (edges + edges.T) / 2
        found.append(
            {
                "na_loss": loss.item(),
                "grad_x": by_x.tolist(),
                "grad_cvs": by_vector.tolist(),
                "edges_after": edges.tolist(),
            }
        )
    return {"per_batch": found}


def _dce(inputs: Data, params: Data) -> Data:
    x, vectors = (torch.tensor(inputs[name]).requires_grad_() for name in ("x", "cvs"))
    gaps = distances(x, vectors)
    loss = distance_cross_entropy(gaps, torch.tensor(inputs["labels"]), params["temp"])
    by_x, by_vector = torch.autograd.grad(loss, [x, vectors])
    return {
        "scores": (-gaps).tolist(),
        "loss": loss.item(),
        "grad_x": by_x.tolist(),
        "grad_cvs": by_vector.tolist(),
    }


FUNCTIONS = {"neighbourhood_vq": _neighbourhood, "dce": _dce}
