"""Which functions of the library compute the reference values of label-agnostic forgetting."""

from __future__ import annotations

from typing import Any

import torch

from palimpsest.forget.classifier.laf import alignment_loss, squashed_error, unlearning_loss
from palimpsest.parts.vae import vae_loss

Data = dict[str, Any]


def _unlearning(inputs: Data, params: Data) -> Data:
    retain, forget = (torch.tensor(inputs[name], requires_grad=True) for name in ("e_retain", "e_forget"))
    rebuilt, rebuilt_forget = (torch.tensor(inputs[name]) for name in ("rec_retain", "rec_forget"))
    of_retain = squashed_error(retain, rebuilt)
    (gradient,) = torch.autograd.grad(of_retain, retain)
    return {
        "S_retain": of_retain.item(),
        "S_forget": squashed_error(forget, rebuilt_forget).item(),
        "L_UE": unlearning_loss(retain, rebuilt, forget, rebuilt_forget).item(),
        "grad_of_S_retain_wrt_e_retain_recon_fixed": gradient.tolist(),
    }


def _alignment(inputs: Data, params: Data) -> Data:
    retain, forget = (
        torch.tensor(inputs[name], requires_grad=True) for name in ("retain_student", "forget_student")
    )
    teachers = (torch.tensor(inputs[name]) for name in ("retain_teacher", "forget_teacher"))
    retain_teacher, forget_teacher = teachers
    loss = alignment_loss(retain, retain_teacher, forget, forget_teacher, params["tau"])
    of_retain, of_forget = torch.autograd.grad(loss, (retain, forget))
    return {
        "L_RA": loss.item(),
        "grad_retain_student": of_retain.tolist(),
        "grad_forget_student": of_forget.tolist(),
    }


def _vae(inputs: Data, params: Data) -> Data:
    tensors = (torch.tensor(inputs[name]) for name in ("recon", "x", "mu", "sigma"))
    return {"loss": vae_loss(*tensors, kl_weight=params["kl_weight"]).item()}


FUNCTIONS = {"l_ue": _unlearning, "l_ra": _alignment, "vae_loss": _vae}
