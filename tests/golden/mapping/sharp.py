"""Which functions of the library compute the reference values of SHARP."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from palimpsest.retain.activation_memory import nearest_class
from palimpsest.retain.contrast import supervised_contrast
from palimpsest.retain.wiring import cut, top_units

Data = dict[str, Any]


def _supcon(inputs: Data, params: Data) -> float:
    features = F.normalize(torch.tensor(inputs["features"], dtype=torch.float64), dim=1)
    return supervised_contrast(features, torch.tensor(inputs["labels"]), params["temperature"]).item()


def _top_neurons(inputs: Data, params: Data) -> list[int]:
    return top_units(torch.tensor(inputs["activation"]), params["percent"]).tolist()


def _masked_knn(inputs: Data, params: Data) -> list[int]:
    banks = [torch.tensor(rows) for rows in inputs["bank"]]
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in inputs["masks"]]
    queries = torch.tensor(inputs["queries"])
    return nearest_class(queries, banks, masks, range(len(banks)), params["k"]).tolist()


def _drop_masks(inputs: Data, params: Data) -> list[list[list[float]]]:
    types = pairwise(torch.tensor(units) for units in inputs["unit_types"])
    masks = (torch.tensor(mask, dtype=torch.bool) for mask in inputs["weight_masks"])
    found = [cut(source, target, mask) for (source, target), mask in zip(types, masks, strict=True)]
    return [mask.float().tolist() for mask in found]


FUNCTIONS = {
    "supcon": _supcon, "top_neurons": _top_neurons, "masked_knn": _masked_knn, "drop_masks": _drop_masks,
}  # fmt: skip
