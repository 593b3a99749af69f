"""Which functions of the library compute the reference values of influence approximation unlearning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.classifier.iau import IAU, descent_direction
from palimpsest.parts.gradients import mean_gradient
from palimpsest.parts.training import TrainingRecipe, fit, training_loss
from palimpsest.tasks.classification import Classification

Data = dict[str, Any]
TASK = Classification()


def _linear(inputs: Data) -> nn.Linear:
    w, b = torch.tensor(inputs["W"]), torch.tensor(inputs["b"])
    model = nn.Linear(w.shape[1], w.shape[0])
    model.load_state_dict({"weight": w, "bias": b})
    return model


def _records(x: list[Any], y: list[int], name: str) -> Records:
    return Records(
        TensorDataset(torch.tensor(x), torch.tensor(y)), ids=[f"{name}-{number}" for number in range(len(y))]
    )


def _step(inputs: Data, params: Data) -> Data:
    model, runtime = _linear(inputs), Runtime(device="cpu")
    retain = _records(inputs["retain_x"], inputs["retain_y"], "retain")
    forget = _records(inputs["forget_x"], inputs["forget_y"], "forget")
    gradient = descent_direction(
        mean_gradient(model, runtime.batches(forget, TASK), TASK),
        mean_gradient(model, runtime.batches(retain, TASK), TASK),
    )
    method = IAU(lr=params["lr"], optimizer=params.get("optimizer", "Adam").lower())
    after = method.unlearn(model, ForgetSplit(forget, retain), TASK, runtime)
    assert isinstance(after, nn.Linear)
    return {
        "grad_W": gradient["weight"].tolist(),
        "grad_b": gradient["bias"].tolist(),
        "W_after": after.weight.tolist(),
        "b_after": after.bias.tolist(),
    }


def _restricted(inputs: Data, params: Data) -> Data:
    model, records = _linear(inputs), _records(inputs["x"], inputs["y"], "train")
    alpha = params["alpha"] if params["model_fix_flag"] else 0.0
    batch = records.batch(range(len(records)), TASK.collate)
    loss = training_loss(model, batch, TASK, alpha)
    recipe = TrainingRecipe(
        epochs=1,
        lr=params["sgd_lr"],
        batch_size=len(records),
        optimizer="sgd",
        momentum=0.0,
        gradient_restriction=alpha,
    )
    after = fit(model, records, TASK, Runtime(device="cpu"), recipe)
    assert isinstance(after, nn.Linear)
    return {"loss": loss.item(), "W_after": after.weight.tolist(), "b_after": after.bias.tolist()}


FUNCTIONS = {"one_adam_step": _step, "gradient_restriction_loss": _restricted}
