"""Which functions of the library compute the reference values of the continual-learning baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from palimpsest.core.matrix import ScoreMatrix
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.retain.buffers import herding_order, reservoir_slots
from palimpsest.retain.learner import build_learner
from palimpsest.retain.methods.derpp import dark_loss
from palimpsest.retain.methods.er_ace import asymmetric_cross_entropy
from palimpsest.retain.methods.ewc import accumulated, fisher_diagonal, penalty
from palimpsest.retain.methods.icarl import exemplar_loss
from palimpsest.retain.methods.lwf import distillation
from palimpsest.retain.metrics import forgetting_so_far, forgetting_with_last
from palimpsest.retain.projection import project_into_cone, project_out
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student, Training
from palimpsest.tasks.classification import Classification

Data = dict[str, Any]
TASK = Classification()


def _linear(w: Any, b: Any) -> nn.Linear:
    weight = torch.tensor(w)
    model = nn.Linear(weight.shape[1], weight.shape[0])
    model.load_state_dict({"weight": weight, "bias": torch.tensor(b)})
    return model


def _flat(values: dict[str, Tensor]) -> list[float]:
    return torch.cat([values["weight"].flatten(), values["bias"]]).detach().tolist()


def _batch(data: Data) -> Data:
    y = torch.tensor(data["y"])
    return {
        "input": torch.tensor(data["x"]),
        "label": y,
        "id": [str(i) for i in range(len(y))],
        "index": torch.arange(len(y)),
    }


def _reservoir(inputs: Data, params: Data) -> Data:
    size, draws = params["size"], inputs["draws"]
    count = size + len(draws)
    numbers = torch.arange(count)
    slots = reservoir_slots(numbers, torch.tensor([0] * size + draws), size).tolist()
    buffer: dict[int, int] = {}
    for item, slot in enumerate(slots):
        if slot >= 0:
            buffer[slot] = item
    return {"slots": slots, "buffer": [buffer[slot] for slot in range(size)], "num_seen": count}


def _metrics(inputs: Data, params: Data) -> Data:
    matrix = ScoreMatrix(np.array(inputs["R"]))
    return {
        "average_accuracy": matrix.average,
        "bwt": matrix.backward_transfer,
        "fwt": matrix.forward_transfer(np.array(inputs["rand"])),
        "forgetting_mammoth": forgetting_with_last(matrix),
        "forgetting_matrix_avalanche": forgetting_so_far(matrix).tolist(),
    }


def _agem(inputs: Data, params: Data) -> Data:
    g, reference = torch.tensor(inputs["g"]), torch.tensor(inputs["ref"])
    return {"dot": float(g @ reference), "result": project_out(g, reference).tolist()}


def _gem(inputs: Data, params: Data) -> Data:
    g, references = torch.tensor(inputs["g"]), torch.tensor(inputs["G"])
    return {"result": project_into_cone(g, references, params["margin"], params["eps"]).tolist()}


def _lwf(inputs: Data, params: Data) -> Data:
    old, new = torch.tensor(inputs["old_logits"]), torch.tensor(inputs["new_logits"], requires_grad=True)
    past = torch.zeros(old.shape[1], dtype=torch.bool)
    past[inputs["active"]] = True
    loss = distillation(new, old, past, params["T"])
    loss.backward()
    assert new.grad is not None
    with torch.no_grad():
        entropy = distillation(old, old, past, params["T"])
    return {
        "loss_mammoth": loss.item(),
        "grad_new_logits": new.grad.tolist(),
        "loss_avalanche": (loss - entropy).item(),
    }


def _ewc(inputs: Data, params: Data) -> Data:
    model = _linear(inputs["W"], inputs["b"])
    fisher: dict[str, Tensor] | None = None
    after = []
    for task in inputs["tasks"]:
        batches = [_batch(batch) for batch in task]
        records = sum(len(batch["id"]) for batch in batches)
        share = records / (len(batches) * params["nominal_batch_size"])
        found = fisher_diagonal(model, batches, TASK, by_probability=True)
        found = {name: value * share for name, value in found.items()}
        fisher = found if fisher is None else accumulated(fisher, found, params["gamma"])
        after.append(_flat(fisher))
    assert fisher is not None
    anchor = {name: value.detach() for name, value in model.named_parameters()}
    moved = _linear(inputs["W_new"], inputs["b_new"])
    cost = params["lambda"] * penalty(moved, fisher, anchor)
    cost.backward()
    gradient = {name: value.grad for name, value in moved.named_parameters() if value.grad is not None}
    return {"fisher_after": after, "penalty": cost.item(), "penalty_grad": _flat(gradient)}


def _si(inputs: Data, params: Data) -> Data:
    model = _linear(inputs["W"], inputs["b"])
    runtime, training = Runtime(device="cpu"), Training(lr=params["lr"], batch_size=10**6)
    learner: Any = build_learner("si", {"c": params["c"], "xi": params["xi"]})
    learner.begin(Student(model, TASK, runtime, training, "domain", len(inputs["b"])))
    found: Data = {}
    for index, name in enumerate(("task1", "task2")):
        batches = [_batch(batch) for batch in inputs[name]]
        whole = TensorDataset(*(torch.cat([batch[key] for batch in batches]) for key in ("input", "label")))
        classes = tuple(range(len(inputs["b"])))
        experience = Experience(Records(whole), Records(whole), index, classes)
        learner.student.batches = lambda _records, batches=batches: iter(batches)
        learner.observe(experience)
        found[f"params_after_{name}"] = _flat(dict(model.named_parameters()))
        if index == 0:
            found["small_omega_after_task1"] = _flat(learner.path)
            found["big_omega"] = _flat(learner.importance)
    return found


def _derpp(inputs: Data, params: Data) -> Data:
    model = _linear(inputs["W"], inputs["b"])
    logits = model(torch.tensor(inputs["x"]))
    loss = F.cross_entropy(logits, torch.tensor(inputs["y"])) + dark_loss(
        model(torch.tensor(inputs["buffer1_x"])),
        torch.tensor(inputs["buffer1_logits"]),
        model(torch.tensor(inputs["buffer2_x"])),
        torch.tensor(inputs["buffer2_y"]),
        params["alpha"],
        params["beta"],
    )
    loss.backward()
    gradient = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.item(), "grad_flat": _flat(gradient), "stored_logits": logits.tolist()}


def _icarl(inputs: Data, params: Data) -> Data:
    logits = torch.tensor(inputs["logits"], requires_grad=True)
    past = torch.arange(logits.shape[1]) < params["n_past"]
    loss = exemplar_loss(logits, torch.tensor(inputs["labels"]), torch.tensor(inputs["old_logits"]), past)
    loss.backward()
    assert logits.grad is not None
    return {"loss": loss.item(), "grad": logits.grad.tolist()}


def _herding(inputs: Data, params: Data) -> Data:
    return {
        "order": herding_order(torch.tensor(inputs["features"]), params["k"], params["normalize"]).tolist()
    }


def _er_ace(inputs: Data, params: Data) -> Data:
    new = torch.tensor(inputs["logits_in"], requires_grad=True)
    old = torch.tensor(inputs["logits_buffer"], requires_grad=True)
    loss = asymmetric_cross_entropy(new, torch.tensor(inputs["y_in"]), old, torch.tensor(inputs["y_buffer"]))
    loss.backward()
    assert new.grad is not None and old.grad is not None
    return {"loss": loss.item(), "grad_in": new.grad.tolist(), "grad_buffer": old.grad.tolist()}


FUNCTIONS = {
    "reservoir": _reservoir,
    "metrics": _metrics,
    "agem": _agem,
    "gem": _gem,
    "lwf": _lwf,
    "online_ewc": _ewc,
    "si": _si,
    "derpp": _derpp,
    "icarl": _icarl,
    "herding": _herding,
    "er_ace": _er_ace,
}
