"""Which functions of the library compute the reference values of PRD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from palimpsest.retain.contrast import supervised_contrast
from palimpsest.retain.methods.prd import cosines, prototype_loss, relation_distillation

Data = dict[str, Any]


def _stacked(tasks: Any) -> tuple[Tensor, list[list[int]]]:
    """Prototypes of all tasks in one tensor, and the classes of each task."""
    classes, start = [], 0
    for task in tasks:
        classes.append(list(range(start, start + len(task))))
        start += len(task)
    return torch.tensor([row for task in tasks for row in task]), classes


def _prototypes(inputs: Data, params: Data) -> Data:
    vectors, classes = _stacked(inputs["prototypes_per_task"])
    vectors.requires_grad_()
    loss = prototype_loss(torch.tensor(inputs["features"]), vectors, torch.tensor(inputs["labels"]))
    (gradient,) = torch.autograd.grad(loss, [vectors])
    return {"loss": loss.item(), "grad_current": gradient[classes[inputs["task"]]].tolist()}


def _relations(inputs: Data, params: Data) -> Data:
    old_vectors, classes = _stacked(inputs["old_prototypes_per_task"])
    vectors = _stacked(inputs["new_prototypes_per_task"])[0].requires_grad_()
    features, old = (torch.tensor(inputs[f"{name}_features"]) for name in ("new", "old"))
    features.requires_grad_()
    task = inputs["task"]
    loss = relation_distillation(features, vectors, old, old_vectors, classes[:task], params["T"])
    if not loss.requires_grad:
        return {
            "loss": loss.item(),
            "grad_new_features": torch.zeros_like(features).tolist(),
            "grad_new_prototypes": [None] * len(classes),
        }
    by_feature, by_vector = torch.autograd.grad(loss, [features, vectors])
    per_task = [by_vector[rows].tolist() if number < task else None for number, rows in enumerate(classes)]
    return {
        "loss": loss.item(),
        "grad_new_features": by_feature.tolist(),
        "grad_new_prototypes": per_task,
    }


def _supcon(inputs: Data, params: Data) -> Data:
    views = F.normalize(torch.tensor(inputs["features"]), dim=2).requires_grad_()
    count = views.shape[1]
    rows = views.transpose(0, 1).reshape(-1, views.shape[2])
    labels = torch.tensor(inputs["labels"]).repeat(count)
    loss = supervised_contrast(rows, labels, params["temperature"], params["base_temperature"])
    (gradient,) = torch.autograd.grad(loss, [views])
    return {"loss": loss.item(), "grad_normalised": gradient.tolist()}


def _inference(inputs: Data, params: Data) -> Data:
    vectors, classes = _stacked(inputs["prototypes_per_task"])
    scores = cosines(torch.tensor(inputs["features"]), vectors)
    return {
        "ci_scores": scores.tolist(),
        "ti_scores_per_task": [scores[:, rows].tolist() for rows in classes],
    }


FUNCTIONS = {
    "prototype_loss": _prototypes,
    "relation_distillation": _relations,
    "supcon": _supcon,
    "inference": _inference,
}
