"""Which functions of the library compute the reference values of RMU as it is scored on WMDP."""

from __future__ import annotations

from typing import Any

import torch

from palimpsest.forget.objectives import weighted
from palimpsest.forget.steering import control_vector, state_distance

Data = dict[str, Any]


def _rmu(inputs: Data, params: Data) -> Data:
    control = control_vector(torch.tensor(inputs["u"]), params["steering_coeff"])
    forget, retain, frozen, forget_mask, retain_mask = (
        torch.tensor(inputs[name])
        for name in (
            "forget_activations",
            "retain_activations",
            "retain_activations_frozen",
            "forget_mask",
            "retain_mask",
        )
    )
    gone = state_distance(forget, control, forget_mask, "released")
    kept = state_distance(retain, frozen, retain_mask, "released")
    total = weighted(gone, kept, params["gamma"], params["alpha"])
    return {"forget_official": gone.item(), "retain_official": kept.item(), "total_official": total.item()}


FUNCTIONS = {"rmu_loss": _rmu}
