"""Which functions of the library compute the reference values of geometric disentanglement."""

from __future__ import annotations

from typing import Any

import torch

from palimpsest.forget.projection import adam_metric, pcgrad, project_block, project_out, whiten

Data = dict[str, Any]


def _project(inputs: Data, params: Data) -> Data:
    gradient = torch.tensor(inputs["g"])
    directions = [torch.tensor(direction) for direction in inputs["basis"]]
    aligned = project_block(gradient, directions, params["lambda_align"])
    along = torch.zeros_like(gradient)
    for direction in directions:
        along += gradient - project_block(gradient, [direction])
    return {
        "perp": project_block(gradient, directions).tolist(),
        "perp_lambda": project_block(aligned, directions).tolist(),
        "tan": along.tolist(),
    }


def _surgery(inputs: Data, params: Data) -> Data:
    forget, retain = ([torch.tensor(part) for part in inputs[side]] for side in ("forget", "retain"))
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (forget, retain)]
    found: Data = {}
    for name, project in (("gu", project_out), ("pcgrad", pcgrad)):
        surgery = project(*flat, eps=params["eps"])
        parts = surgery.projected.split([part.numel() for part in forget])
        found[name] = {
            "coefficient": surgery.coefficient,
            "conflict": surgery.conflict,
            "projected": [part.view(like.shape).tolist() for part, like in zip(parts, forget, strict=True)],
        }
    return found


def _denominator(inputs: Data, params: Data) -> Data:
    moment = torch.tensor(inputs["exp_avg_sq"])
    metric = adam_metric(moment, inputs["step"], params["beta2"], params["eps"])
    return {"sqrt_denominator": (1 / whiten(torch.ones_like(moment), metric)).tolist()}


FUNCTIONS = {"project": _project, "global_surgery": _surgery, "adam_denominator": _denominator}
