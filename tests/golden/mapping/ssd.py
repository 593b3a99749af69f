"""Which functions of the library compute the reference values of SSD."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from palimpsest.forget.classifier.ssd import dampen
from palimpsest.parts.importance import squared_gradients
from palimpsest.tasks.classification import Classification


def _dampen(inputs: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    before, full, forget = (
        {name: torch.tensor(value) for name, value in inputs[key].items()}
        for key in ("params", "full_importance", "forget_importance")
    )
    after = dampen(before, full, forget, params["alpha"], params["lambda"], params.get("cap", 1.0))
    return {name: value.tolist() for name, value in after.items()}


def _importance(inputs: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    model, reference_names = _network(inputs)
    batches = [
        {
            "input": torch.tensor(batch["x"]),
            "label": torch.tensor(batch["y"]),
            "id": [str(i) for i in range(len(batch["y"]))],
        }
        for batch in inputs["batches"]
    ]
    found = squared_gradients(model, batches, Classification())
    return {reference_names[name]: value.tolist() for name, value in found.items()}


def _network(inputs: dict[str, Any]) -> tuple[nn.Sequential, dict[str, str]]:
    """Linear layers W, b or W1, b1, W2, b2, ... with ReLU between; the reference's names by ours."""
    suffixes = [""] if "W" in inputs else [str(i) for i in range(1, 100) if f"W{i}" in inputs]
    model, names = nn.Sequential(), {}
    for suffix in suffixes:
        weight, bias = torch.tensor(inputs[f"W{suffix}"]), torch.tensor(inputs[f"b{suffix}"])
        if len(model):
            model.append(nn.ReLU())
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, bias
        names |= {f"{len(model)}.weight": f"W{suffix}", f"{len(model)}.bias": f"b{suffix}"}
        model.append(layer)
    return model, names


FUNCTIONS = {"dampen": _dampen, "importance": _importance}
