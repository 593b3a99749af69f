"""Which functions of the library compute the reference values of unlearning from logit difference."""

from __future__ import annotations

from typing import Any

import torch

from palimpsest.forget.language.uld_data import assistant_loss, interleave
from palimpsest.parts.logit_combination import eligible, logit_difference, relative_top_threshold
from palimpsest.parts.tokens import token_mean

Data = dict[str, Any]


def _filter(inputs: Data, params: Data) -> Data:
    logits, rho = torch.tensor(inputs["logits"]), params["relative_top"]
    return {
        "mask": (~eligible(logits, rho, as_released=True)).int().tolist(),
        "threshold": relative_top_threshold(logits, rho, as_released=True).tolist(),
    }


def _combine(inputs: Data, params: Data) -> Data:
    base, assistant, labels = (
        torch.tensor(inputs[name]) for name in ("base_logits", "assistant_logits", "labels")
    )
    plain = logit_difference(base, assistant, -params["weight"])
    filtered = logit_difference(base, assistant, -params["weight"], params["relative_top"], as_released=True)
    return {
        "logits_no_filter": plain.tolist(),
        "loss_no_filter": token_mean(plain, labels).item(),
        "logits_filtered": filtered.tolist(),
        "loss_filtered": token_mean(filtered, labels).item(),
    }


def _assistant(inputs: Data, params: Data) -> Data:
    logits = torch.tensor(inputs["logits"], requires_grad=True)
    labels, retained = torch.tensor(inputs["labels"]), torch.tensor(inputs["retainlabels"]).bool()
    found = assistant_loss(logits, labels, retained, params["retain_weight"])
    (gradient,) = torch.autograd.grad(found.total, logits)
    return {
        "loss": found.total.item(),
        "forget_loss": found.remember.item(),
        "retain_loss": found.uniform.item(),
        "grad_wrt_logits": gradient.tolist(),
    }


def _interleave(inputs: Data, params: Data) -> Data:
    return {"order": interleave(inputs["forget"], inputs["retain"], as_released=True)}


FUNCTIONS = {
    "relative_top_filter": _filter,
    "combine_logits": _combine,
    "assistant_loss": _assistant,
    "interleave": _interleave,
}
