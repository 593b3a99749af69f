"""Classifier baselines: which functions of the library compute the reference functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.audit.distance import zrf
from palimpsest.audit.membership.signals import entropy, modified_entropy_as_released
from palimpsest.forget.classifier.bad_teacher import bad_teacher_loss
from palimpsest.forget.classifier.boundary_shrink import nearest_label
from palimpsest.forget.classifier.fisher_noise import noise_distribution, per_sample_fisher
from palimpsest.forget.classifier.influence import woodfisher
from palimpsest.forget.classifier.neggrad_plus import neggrad_plus_loss
from palimpsest.forget.classifier.salun import saliency_mask
from palimpsest.forget.classifier.scrub import max_loss, min_loss
from palimpsest.parts.distillation import kl_divergence
from palimpsest.parts.training import step
from palimpsest.tasks.classification import Classification

Data = dict[str, Any]
TASK = Classification()


def _linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    w, b = torch.tensor(weight), torch.tensor(bias)
    model = nn.Linear(w.shape[1], w.shape[0])
    model.load_state_dict({"weight": w, "bias": b})
    return model


def _batch(x: list[Any], y: list[int]) -> Data:
    return {"input": torch.tensor(x), "label": torch.tensor(y), "id": [str(i) for i in range(len(y))]}


def _descend(model: nn.Linear, loss: Tensor, lr: float, batch: Data) -> Data:
    step(model, torch.optim.SGD(model.parameters(), lr), loss, batch)
    return {"W_after": model.weight.tolist(), "b_after": model.bias.tolist()}


def _badt(inputs: Data, params: Data) -> Data:
    loss = bad_teacher_loss(
        torch.tensor(inputs["student_logits"]),
        torch.tensor(inputs["full_teacher_logits"]),
        torch.tensor(inputs["bad_teacher_logits"]),
        torch.tensor(inputs["is_forget"]).bool(),
        params["T"],
        reduction="mean",
    )
    return {"loss": loss.item()}


def _zrf(inputs: Data, params: Data) -> Data:
    model, reference = torch.tensor(inputs["model_probs"]), torch.tensor(inputs["bad_teacher_probs"])
    return {"zrf": float(zrf(model, reference, reduction="elementwise"))}


def _scrub_kl(inputs: Data, params: Data) -> Data:
    student, teacher = torch.tensor(inputs["student_logits"]), torch.tensor(inputs["teacher_logits"])
    kl = kl_divergence(student, teacher, params["T"], "batchmean", square_temperature=True)
    return {"kl": kl.item()}


def _neggrad_plus(inputs: Data, params: Data) -> Data:
    model = _linear(inputs["W"], inputs["b"])
    retain = _batch(inputs["retain_x"], inputs["retain_y"])
    forget = _batch(inputs["forget_x"], inputs["forget_y"])
    loss = neggrad_plus_loss(
        TASK.loss_per_example(model, retain).mean(),
        TASK.loss_per_example(model, forget).mean(),
        params["alpha"],
    )
    return _descend(model, loss, params["lr"], retain)


def _scrub_step(inputs: Data, params: Data) -> Data:
    student = _linear(inputs["W_student"], inputs["b_student"])
    teacher = _linear(inputs["W_teacher"], inputs["b_teacher"])
    batch = _batch(inputs["x"], inputs["y"])
    logits, taught = TASK.logits(student, batch), TASK.logits(teacher, batch).detach()
    if params["split"] == "maximize":
        loss = max_loss(logits, taught, params["T"])
    else:
        right = TASK.loss_of_logits(logits, batch).mean()
        loss = min_loss(logits, taught, right, params["alpha"], params["gamma"], params["T"])
    return _descend(student, loss, params["lr"], batch)


def _salun_mask(inputs: Data, params: Data) -> Data:
    batches = [_batch(batch["x"], batch["y"]) for batch in inputs["batches"]]
    mask = saliency_mask(_linear(inputs["W"], inputs["b"]), batches, TASK, params["ratio"])
    return {"mask_W": mask["weight"].int().tolist(), "mask_b": mask["bias"].int().tolist()}


def _woodfisher(inputs: Data, params: Data) -> Data:
    model = _linear(inputs["W"], inputs["b"])
    flat = torch.tensor(inputs["v"])
    v = {
        "weight": flat[: model.weight.numel()].reshape(model.weight.shape),
        "bias": flat[model.weight.numel() :],
    }
    k = woodfisher(model, [_batch(inputs["x"], inputs["y"])], TASK, v, params["N"])
    return {"k": [*k["weight"].flatten().tolist(), *k["bias"].tolist()]}


def _diag_fisher(inputs: Data, params: Data) -> Data:
    batches = [_batch(inputs["x"], inputs["y"])]
    fisher = per_sample_fisher(_linear(inputs["W"], inputs["b"]), batches, TASK, "empirical")
    return {"fisher_W": fisher["weight"].tolist(), "fisher_b": fisher["bias"].tolist()}


def _fisher_noise(inputs: Data, params: Data) -> Data:
    forgotten = [] if params["forget_class"] is None else [params["forget_class"]]
    parameter, fisher = torch.tensor(inputs["param"]), torch.tensor(inputs["fisher"])
    mean, variance = noise_distribution(parameter, fisher, params["alpha"], params["num_classes"], forgotten)
    return {"mu": mean.tolist(), "var": variance.tolist()}


def _boundary_shrink(inputs: Data, params: Data) -> Data:
    batch = _batch(inputs["x"], inputs["y"])
    moved, label = nearest_label(_linear(inputs["W"], inputs["b"]), batch, TASK, params["bound"])
    return {"x_adv": moved.tolist(), "new_label": label.tolist()}


def _svc_mia_features(inputs: Data, params: Data) -> Data:
    probabilities, labels = torch.tensor(inputs["probs"]), torch.tensor(inputs["labels"])
    return {
        "entropy": entropy(probabilities).tolist(),
        "m_entropy_official_buggy": modified_entropy_as_released(probabilities, labels).tolist(),
    }


FUNCTIONS: dict[str, Callable[[Data, Data], Data]] = {
    "badt": _badt,
    "zrf": _zrf,
    "scrub_kl": _scrub_kl,
    "neggrad_plus": _neggrad_plus,
    "scrub_minimize": _scrub_step,
    "salun_mask": _salun_mask,
    "woodfisher": _woodfisher,
    "diag_fisher": _diag_fisher,
    "fisher_noise": _fisher_noise,
    "boundary_shrink": _boundary_shrink,
    "svc_mia_features": _svc_mia_features,
}
