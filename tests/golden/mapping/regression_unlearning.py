"""Which functions of the library compute the reference values of deep regression unlearning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.forget.regression.blindspot import (
    as_mask,
    attention_difference,
    attention_map,
    batch_loss,
    forget_loss,
    watching,
)
from palimpsest.tasks.regression import Regression, pinball

Data = dict[str, Any]
TASK = Regression(loss="mae")


def _real(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


class _Network(nn.Module):
    """A 1x1 convolution without bias and a linear layer: what the reference calls the model."""

    def __init__(self, weights: Data, shape: torch.Size):
        super().__init__()
        conv, fc = _real(weights["conv"]), _real(weights["fc"])
        self.conv = nn.Conv2d(shape[1], conv.numel() // shape[1], 1, bias=False)
        self.fc = nn.Linear(fc.numel(), 1)
        with torch.no_grad():
            self.conv.weight.copy_(conv.reshape(self.conv.weight.shape))
            self.fc.weight.copy_(fc.reshape(1, -1))
            self.fc.bias.fill_(weights["fc_bias"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


def _attention(inputs: Data, params: Data) -> Data:
    student, blindspot = _real(inputs["a_student"]), _real(inputs["a_blindspot"])
    return {
        "att_student": attention_map(student).tolist(),
        "att_blindspot": attention_map(blindspot).tolist(),
        "attention_diff": attention_difference(student, blindspot).item(),
    }


def _forget_loss(inputs: Data, params: Data) -> Data:
    student, blindspot = _real(inputs["student_out"]), _real(inputs["blindspot_out"])
    gone = as_mask(torch.tensor(inputs["mask"]), len(student))
    mine, theirs = ([_real(a)[gone] for a in inputs[name]] for name in ("student_acts", "blindspot_acts"))
    loss = forget_loss(student[gone], blindspot[gone], mine, theirs, params["AT_beta"], TASK.distance)
    return {"loss": loss.item()}


def _batch_loss(inputs: Data, params: Data) -> Data:
    x = _real(inputs["x"])
    batch = {"input": x, "label": _real(inputs["y"])}
    networks = [_Network(inputs[name], x.shape) for name in ("student", "blindspot")]
    seen: list[list[Tensor]] = []
    given: list[Tensor] = []
    for network in networks:
        with watching(network, ["conv"]) as activations:
            given.append(TASK.logits(network, batch))
            seen.append(list(activations.values()))
    losses = TASK.loss_of_logits(given[0], batch)
    flags = torch.tensor(inputs["is_forget"])
    loss = batch_loss(*given, *seen, losses, flags, params["AT_beta"], TASK.distance)
    return {"batch_loss": loss.item()}


def _quantile_loss(inputs: Data, params: Data) -> Data:
    wanted = _real(inputs["target"])[:, None]
    return {"loss": pinball(_real(inputs["preds"]), wanted, params["quantiles"]).mean().item()}


FUNCTIONS = {
    "attention": _attention,
    "forget_loss": _forget_loss,
    "blindspot_batch": _batch_loss,
    "quantile_loss": _quantile_loss,
}
