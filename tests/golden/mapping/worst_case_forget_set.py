"""Which functions of the library compute the reference values of worst-case forget sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.forget.classifier.sign_finetune import SignFineTune, weighted_loss
from palimpsest.study.worst_case.baselines import moderate_distance
from palimpsest.study.worst_case.lower_level import record_losses
from palimpsest.study.worst_case.selection import Goal, objective, project, top, upper_step
from palimpsest.tasks.classification import Classification

Data = dict[str, Any]
TASK, RUNTIME = Classification(), Runtime(device="cpu")


def _linear(inputs: Data) -> nn.Linear:
    w, b = torch.tensor(inputs["W"]), torch.tensor(inputs["b"])
    model = nn.Linear(w.shape[1], w.shape[0])
    model.load_state_dict({"weight": w, "bias": b})
    return model


def _records(inputs: Data) -> Records:
    return Records(TensorDataset(torch.tensor(inputs["x"]), torch.tensor(inputs["y"])))


def _project(inputs: Data, params: Data) -> Data:
    w = project(np.array(inputs["a"]), params["m"])
    return {"w": w.tolist(), "sum": float(w.sum())}


def _select(goal: Goal, inputs: Data, params: Data) -> Data:
    losses = record_losses(_linear(inputs), _records(inputs), TASK, RUNTIME)
    w = upper_step(np.array(inputs["w"]), losses, params["m"], params["w_lr"], params["gamma"], goal)
    return {
        "per_sample_loss": losses.tolist(),
        "w_new": w.tolist(),
        "objective": objective(w, losses),
        "top_m": top(w, params["m"]).tolist(),
    }


def _sign_step(inputs: Data, params: Data) -> Data:
    model, records = _linear(inputs), _records(inputs)
    batch = records.batch(range(len(records)), TASK.collate)
    loss = weighted_loss(TASK.loss_per_example(model, batch), 1 - torch.tensor(inputs["w"]))
    method = SignFineTune(lr=params["lr"], epochs=1, batch_size=len(records))
    after = method.unlearn_weighted(model, records, inputs["w"], TASK, RUNTIME)
    assert isinstance(after, nn.Linear)
    return {"loss": loss.item(), "W_after": after.weight.tolist(), "b_after": after.bias.tolist()}


def _moderate(inputs: Data, params: Data) -> Data:
    return {"distance": moderate_distance(np.array(inputs["features"]), inputs["labels"]).tolist()}


FUNCTIONS = {
    "project": _project,
    "select_step": lambda inputs, params: _select("hardest", inputs, params),
    "reverse_select": lambda inputs, params: _select("easiest", inputs, params),
    "sign_step": _sign_step,
    "moderate_distance": _moderate,
}
