"""Which functions of the library compute the reference values of the language unlearning baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palimpsest.forget import objectives as o
from palimpsest.forget import primal_dual, steering
from palimpsest.forget.language import corruption, muse_losses
from palimpsest.forget.language.arithmetic import negate_task_vector
from palimpsest.forget.language.in_context import flipped_label_prompt
from palimpsest.parts.logit_combination import whp_logits
from palimpsest.parts.tokens import sequence_losses, token_counts, token_mean

Data = dict[str, Any]


def _losses(inputs: Data, params: Data) -> Data:
    data = {name: torch.tensor(value) for name, value in inputs.items()}
    logits = data["forget_logits"].requires_grad_()
    labels = data["forget_labels"]
    counts = token_counts(labels)
    forget = sequence_losses(logits, labels)
    reference = sequence_losses(data["ref_forget_logits"], labels)
    chosen, chosen_reference = (
        sequence_losses(data[f"{name}_logits"], data["alt_labels"]) for name in ("alt", "ref_alt")
    )
    retain = token_mean(data["retain_logits"], data["retain_labels"])
    kl = o.kl_retain_loss(data["retain_logits"], data["ref_retain_logits"])
    beta, weights = params["beta"], (params["gamma"], params["alpha"])
    ascent = o.gradient_ascent_loss(forget, counts)
    npo = o.npo_loss(forget, reference, beta)
    dpo = o.dpo_loss(chosen, chosen_reference, forget, reference, beta)
    simnpo = o.simnpo_loss(forget, counts, params["simnpo_beta"], params["simnpo_delta"])
    values: dict[str, Tensor] = {
        "nll_forget_hf_token_mean": o.mean_token_loss(forget, counts),
        "grad_ascent": ascent,
        "grad_diff_nll": o.weighted(ascent, retain, *weights),
        "kl_retain_term": kl,
        "grad_diff_kl": o.weighted(ascent, kl, *weights),
        "batch_nll_sum_per_sequence": forget,
        "npo_forget": npo,
        "npo_total": o.weighted(npo, retain, *weights),
        "dpo_forget": dpo,
        "dpo_total": o.weighted(dpo, retain, *weights),
        "simnpo_forget": simnpo,
        "simnpo_total": o.weighted(simnpo, retain, params["simnpo_gamma"], params["alpha"]),
        "wga_forget": o.wga_loss(logits, labels, params["wga_beta"]),
        "satimp_forget": o.satimp_loss(logits, labels, params["satimp_beta1"], params["satimp_beta2"]),
        "ceu": o.ceu_loss(logits, labels, params["ceu_ignore_first_n"]),
        "pdu_forget": primal_dual.flatness_loss(logits, labels, as_released=True),
    }
    gradients = {
        name: torch.autograd.grad(value, logits, retain_graph=True)[0].tolist()
        for name, value in values.items()
        if value.requires_grad and value.dim() == 0
    }
    return {
        "values": {name: value.tolist() for name, value in values.items()},
        "grad_wrt_forget_logits": gradients,
    }


def _undial(inputs: Data, params: Data) -> Data:
    student = torch.tensor(inputs["student_logits"], requires_grad=True)
    teacher, labels = torch.tensor(inputs["teacher_logits"]), torch.tensor(inputs["labels"])
    loss = o.undial_loss(student, teacher, labels, params["beta"])
    (gradient,) = torch.autograd.grad(loss, student)
    return {"loss": loss.item(), "grad_wrt_student_logits": gradient.tolist()}


def _rmu(inputs: Data, params: Data) -> Data:
    draw = torch.tensor(inputs["uniform_draw"])
    control = steering.control_vector(draw.flatten(), params["steering_coeff"])
    mask = torch.tensor(inputs["mask"]).bool()
    forget, retain, frozen = (
        torch.tensor(inputs[name])
        for name in ("forget_activations", "retain_activations", "ref_retain_activations")
    )
    return {
        "control_vector": control.view(draw.shape).tolist(),
        "forget_loss": steering.state_distance(forget, control, mask, "released").item(),
        "retain_loss": steering.state_distance(retain, frozen, mask, "released").item(),
    }


def _pdu(inputs: Data, params: Data) -> Data:
    multiplier = params["lambda0"]
    totals, after = [], []
    for forget, retain in zip(inputs["forget_loss"], inputs["retain_loss"], strict=True):
        bound = params["retain_loss_eps"]
        total = primal_dual.pdu_loss(
            torch.tensor(forget), torch.tensor(retain), multiplier, bound, params["gamma"]
        )
        totals.append(total.item())
        multiplier = primal_dual.dual_update(multiplier, retain, bound, params["dual_step_size"])
        after.append(multiplier)
    return {"total": totals, "lambda_after": after}


def _arithmetic(inputs: Data, params: Data) -> Data:
    target, finetuned, pretrained = (
        {name: torch.tensor(value) for name, value in inputs[key].items()}
        for key in ("target", "finetuned", "pretrained")
    )
    moved = negate_task_vector(target, finetuned, pretrained, params["alpha_task_vector"])
    base, reinforced, forget, reference, retain, reference_retain, labels = (
        torch.tensor(inputs[key])
        for key in (
            "whp_base_logits",
            "whp_reinforced_logits",
            "forget_logits",
            "ref_forget_logits",
            "retain_logits",
            "ref_retain_logits",
            "labels",
        )
    )
    npo = muse_losses.npo_on_logits(forget, reference, params["beta"])
    kl = muse_losses.kl_on_logits(retain, reference_retain)
    ascent = o.gradient_ascent_loss(sequence_losses(forget, labels), token_counts(labels))
    muse = {
        "npo": npo,
        "npo_klr": o.weighted(npo, kl),
        "ga_klr": o.weighted(ascent, kl),
        "ga_gdr": o.weighted(ascent, token_mean(retain, labels)),
    }
    return {
        "task_vector_result": {name: value.tolist() for name, value in moved.items()},
        "whp_logits": whp_logits(base, reinforced, params["alpha_whp"]).tolist(),
        "muse_losses": {name: value.item() for name, value in muse.items()},
    }


CORRUPTIONS = {
    "zero_out_top_k": "zero-top",
    "zero_out_first_n": "zero-first",
    "flip_sign_first_n": "flip-first",
    "flip_sign_top_k": "flip-top",
    "sub_value_top_k": "subtract-top",
    "add_value_least_k": "add-least",
    "sub_value_first_n": "subtract-first",
    "add_value_first_n": "add-first",
}


def _eco(inputs: Data, params: Data) -> Data:
    embeddings, tokens = torch.tensor(inputs["embeddings"]), torch.tensor(inputs["pos"]).bool()
    search = params["zeroth_order"]
    strength, steps = search["beta"], []
    for _ in range(4):
        step = corruption.zeroth_order_step(
            lambda value: (value - 2) ** 2, strength, search["lr"], search["eps"], search["min_beta"]
        )
        strength = step.strength
        steps.append(
            {"beta": strength, "f_score": step.forward, "b_score": step.backward, "grad_est": step.gradient}
        )
    return {
        "corrupted": {
            theirs: corruption.corrupt(embeddings, tokens, ours, params["dims"], params["strength"]).tolist()
            for theirs, ours in CORRUPTIONS.items()
        },
        "target_labels": corruption.carry_labels(
            inputs["src_labels"], inputs["src_offsets"], inputs["tgt_offsets"]
        ),
        "zeroth_order_steps": steps,
    }


def _icul(inputs: Data, params: Data) -> Data:
    forget = [(inputs["forget_text"], inputs["flipped_label"])]
    context = list(zip(inputs["context_texts"], inputs["context_labels"], strict=True))
    return {
        "retain_query": flipped_label_prompt(forget, context, inputs["query_text"]),
        "forget_query": flipped_label_prompt(forget, context, inputs["forget_text"]),
    }


def _idk(inputs: Data, params: Data) -> Data:
    rows = []
    for side in ("idk", "retain"):
        logits, labels = torch.tensor(inputs[f"{side}_logits"]), torch.tensor(inputs[f"{side}_labels"])
        rows += [sequence_losses(logits, labels), token_counts(labels)]
    return {"loss": o.idk_nll_loss(*rows, reduction="joint").item()}


FUNCTIONS = {
    "losses": _losses,
    "undial": _undial,
    "rmu": _rmu,
    "pdu_dual": _pdu,
    "taskvector_whp": _arithmetic,
    "eco_prompts": _eco,
    "icul_prompt": _icul,
    "idk_nll": _idk,
}
