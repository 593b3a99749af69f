"""Which functions of the library compute the reference values of PCR and HPCR."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.matrix import ScoreMatrix
from palimpsest.core.runtime import Runtime
from palimpsest.retain.learner import build_learner
from palimpsest.retain.methods.hpcr import wave
from palimpsest.retain.methods.pcr import proxy_contrast
from palimpsest.retain.metrics import drop_from_best, positive_backward_transfer, upper_mean
from palimpsest.retain.student import Student, Training
from palimpsest.tasks.classification import Classification

Data = dict[str, Any]


def _loss(inputs: Data, params: Data) -> float:
    vectors = torch.tensor(inputs["proxies"])
    new, old = (torch.tensor(inputs[f"{name}_features"]).repeat(2, 1) for name in ("batch", "memory"))
    labels = {name: torch.tensor(inputs[f"{name}_labels"]) for name in ("batch", "memory")}
    if "alpha" not in params:
        both = torch.cat([labels["memory"]] * 2 + [labels["batch"]] * 2)
        return proxy_contrast(torch.cat([old, new]), vectors, both, params["temperature"]).item()
    learner: Any = build_learner(
        "hpcr",
        {
            "temperature": params["temperature"], "tau_max": params["tau_max"], "tau_min": params["tau_min"],
            "class_distillation": params["alpha"], "sample_distillation": params["beta"],
        },
    )  # fmt: skip
    model = nn.Linear(vectors.shape[1], len(vectors), bias=False)
    model.load_state_dict({"weight": vectors})
    learner.begin(Student(model, Classification(), Runtime(device="cpu"), Training(), "class", len(vectors)))
    replayed: dict[str, Tensor] = {"label": labels["memory"]}
    for name in ("logits", "features"):
        if f"memory_stored_{name}" in inputs:
            replayed[name] = torch.tensor(inputs[f"memory_stored_{name}"])
    step = params.get("step", 0)
    return learner._loss(
        new, {"label": labels["batch"]}, old, replayed, params.get("task_index", 0), step
    ).item()


def _tau(inputs: Data, params: Data) -> list[float]:
    return [wave(step, params["tau_max"], params["tau_min"], params["period"]) for step in inputs["steps"]]


def _metrics(inputs: Data, params: Data) -> Data:
    runs = [ScoreMatrix(np.array(run)) for run in inputs["acc"]]
    found = {
        "end_accuracy": [run.average for run in runs],
        "end_forgetting": [drop_from_best(run) for run in runs],
        "average_accuracy": [
            np.mean([row[: step + 1].mean() for step, row in enumerate(run.scores)]) for run in runs
        ],
        "bwt_plus": [positive_backward_transfer(run) for run in runs],
        "fwt": [upper_mean(run) for run in runs],
    }
    return {name: {"mean": float(np.mean(values))} for name, values in found.items()}


FUNCTIONS = {"pcr_loss": _loss, "tau_steps": _tau, "metrics": _metrics}
