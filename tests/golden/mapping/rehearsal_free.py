"""Which functions of the library compute the reference values of rehearsal-free continual learning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from palimpsest.core.matrix import ScoreMatrix
from palimpsest.retain.fisher import diagonal_fisher, even_importance
from palimpsest.retain.methods.ewc import penalty
from palimpsest.retain.methods.lwf import distillation
from palimpsest.retain.methods.lwf_mc import sigmoid_loss
from palimpsest.retain.metrics import forgetting_by_steps
from palimpsest.tasks.classification import Classification

Data = dict[str, Any]


def _bce(inputs: Data, params: Data) -> Data:
    logits = torch.tensor(inputs["logits"]).requires_grad_()
    count, width = params["n_past_classes"], logits.shape[1]
    past = torch.arange(width) < count
    old = torch.zeros(logits.shape)
    if inputs["old_logits"] is not None:
        old[:, :count] = torch.tensor(inputs["old_logits"])
    met = torch.ones(width, dtype=torch.bool)
    loss = sigmoid_loss(logits, torch.tensor(inputs["labels"]), old, past, met)
    (gradient,) = torch.autograd.grad(loss, [logits])
    return {"loss": loss.item(), "grad_logits": gradient.tolist()}


def _softmax(inputs: Data, params: Data) -> Data:
    scores = torch.tensor(inputs["scores"]).requires_grad_()
    allowed = inputs["allowed"]
    past = torch.zeros(scores.shape[1], dtype=torch.bool)
    past[allowed] = True
    given = torch.tensor(inputs["target_scores"])
    target = torch.zeros(scores.shape)
    target[:, allowed] = given if given.shape[1] == len(allowed) else given[:, allowed]
    loss = distillation(scores, target, past, params["T"])
    (gradient,) = torch.autograd.grad(loss, [scores])
    return {"loss": loss.item(), "grad": gradient.tolist()}


def _linear(weight: Any, bias: Any) -> nn.Linear:
    rows = torch.tensor(weight)
    layer = nn.Linear(rows.shape[1], len(rows))
    with torch.no_grad():
        layer.weight.copy_(rows)
        layer.bias.copy_(torch.tensor(bias))
    return layer


def _penalties(inputs: Data, params: Data) -> Data:
    old, new = (_linear(inputs[f"W_{when}"], inputs[f"b_{when}"]) for when in ("old", "new"))
    batches = [
        {"input": torch.tensor(part["x"]), "label": torch.tensor(part["y"]), "id": part["y"]}
        for part in inputs["batches"]
    ]
    labels = "true" if params["empirical"] else "argmax"
    fisher = diagonal_fisher(old, batches, Classification(), labels)
    anchor = {name: value.detach() for name, value in old.named_parameters()}
    return {
        "fisher_W": fisher["weight"].tolist(),
        "fisher_b": fisher["bias"].tolist(),
        "ewc_penalty": params["coef"] * penalty(new, fisher, anchor).item(),
        "l2_penalty": params["coef"] * penalty(new, even_importance(anchor), anchor).item(),
    }


def _forgetting(inputs: Data, params: Data) -> Data:
    return {"forgetting": forgetting_by_steps(ScoreMatrix(np.asarray(inputs["y"], float)))}


FUNCTIONS = {
    "bce": _bce,
    "softmax_predkd": _softmax,
    "ewc_l2": _penalties,
    "incremental_forgetting": _forgetting,
}
