"""Which functions of the library compute the reference values of the View-Batch Model."""

from __future__ import annotations

from typing import Any

import torch

from palimpsest.retain.view_schedule import divergence, epoch_length, served

Data = dict[str, Any]


def _sampler(inputs: Data, params: Data) -> Data:
    orders = [torch.tensor(order) for order in inputs["permutations"]]
    views, rounded = params["V"], params["selected_round"]
    epochs = [served(orders[epoch // views], epoch, views, rounded) for epoch in range(params["epochs"])]
    return {
        "epoch_length": epoch_length(len(orders[0]), rounded),
        "indices": [indices.tolist() for indices in epochs],
    }


def _ssl(inputs: Data, params: Data) -> Data:
    logits = torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True)
    view = torch.arange(len(logits)) % params["V"]
    loss = params.get("alpha", 1.0) * divergence(logits, view, "official_code")
    loss.backward()
    return {"loss": loss.item(), "grad": logits.grad.tolist()}  # pyright: ignore[reportOptionalMemberAccess]


FUNCTIONS = {"sampler": _sampler, "ssl": _ssl}
