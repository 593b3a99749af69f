"""Which functions of the library compute the reference values of FLAT."""

from __future__ import annotations

from typing import Any

import torch

from palimpsest.forget.language.flat_divergences import divergence_named, flat_loss, mean_probability

Data = dict[str, Any]
NAMES = {"Jenson-Shannon": "jensen-shannon"}


def _divergence(name: str):
    return divergence_named(NAMES.get(name, name.lower()), allow_reversed=True)


def _scalars(inputs: Data, params: Data) -> Data:
    pairs = torch.tensor(inputs["pairs_Pforget_Ptemplate"], dtype=torch.float64)
    return {
        name: [_divergence(name).loss(template, forgotten).item() for forgotten, template in pairs]
        for name in params["divergences"]
    }


def _loss(inputs: Data, params: Data) -> Data:
    forget, template = (
        torch.tensor(inputs[f"{side}_logits"], requires_grad=True) for side in ("forget", "template")
    )
    forget_labels, template_labels = (
        torch.tensor(inputs[f"{side}_labels"]) for side in ("forget", "template")
    )
    losses, gradients = {}, {}
    for name in params["divergences"]:
        loss = flat_loss(forget, forget_labels, template, template_labels, _divergence(name), "padded")
        losses[name] = loss.item()
        parts = torch.autograd.grad(loss, [forget, template])
        gradients[name] = {"forget": parts[0].tolist(), "template": parts[1].tolist()}
    return {
        "mean_prob_forget": mean_probability(forget, forget_labels, "padded").item(),
        "mean_prob_template": mean_probability(template, template_labels, "padded").item(),
        "loss": losses,
        "grad": gradients,
    }


FUNCTIONS = {"divergences_scalar": _scalars, "flat_loss": _loss}
