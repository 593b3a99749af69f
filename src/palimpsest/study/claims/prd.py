"""Measurements for the claims of prototype-sample relation distillation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from palimpsest.core.modes import evaluating
from palimpsest.retain.contrast import supervised_contrast
from palimpsest.retain.cosine import class_vectors
from palimpsest.retain.methods.prd import PRD, Axis, prototype_loss, relation_distillation
from palimpsest.study.claims.learned import Learned, learned_measurement


@learned_measurement("prd.start-of-distillation")
def start_of_distillation(learned: Learned) -> float:
    """Distillation loss right after the old network was copied, plus its largest gradient; both axes."""
    run = learned.finished
    student, inputs = run.learner.student, _inputs(learned)
    earlier = [experience.classes for experience in run.stream][:-1]
    with evaluating(student.model), torch.no_grad():
        features = student.features({"input": inputs}).double()
    vectors = class_vectors(student).detach().double()
    found = 0.0
    axes: tuple[tuple[Axis, float], ...] = (("class", 1.0), ("sample", 0.1))
    for axis, temperature in axes:
        h, p = features.clone().requires_grad_(), vectors.clone().requires_grad_()
        loss = relation_distillation(h, p, features, vectors, earlier, temperature, axis)
        found = max([found, abs(loss.item()), *(_largest(g) for g in torch.autograd.grad(loss, [h, p]))])
    return found


@learned_measurement("prd.old-prototypes-move")
def old_prototypes_move(learned: Learned) -> float:
    """Largest change of the first experience's prototypes while the second is learned."""
    run = learned.fresh
    first = list(run.stream[0].classes)
    with run.runtime.limited():
        run.advance()
        before = class_vectors(run.learner.student).detach()[first].clone()
        run.advance()
    return _largest(class_vectors(run.learner.student).detach()[first] - before)


@learned_measurement("prd.others-pulled")
def others_pulled(learned: Learned) -> float:
    """Largest gradient on prototypes: of the prototype loss on absent classes, of the contrast on any."""
    run = learned.finished
    student, newest = run.learner.student, list(run.stream[-1].classes)
    tests = run.stream[-1].test.tensors
    labels = tests["label"] if tests else torch.empty(0, dtype=torch.long)
    features = student.features({"input": _inputs(learned)})
    vectors = class_vectors(student)
    pull = torch.autograd.grad(prototype_loss(features, vectors, labels), [vectors])[0]
    pull[newest] = 0.0
    unit = torch.nn.functional.normalize(student.attached["projection"](features), dim=1)
    temperature = cast(PRD, run.learner).temperature
    contrast = supervised_contrast(unit, labels, temperature)
    none = cast("Tensor | None", torch.autograd.grad(contrast, [vectors], allow_unused=True)[0])
    return _largest(pull) + (0.0 if none is None else _largest(none))


def _inputs(learned: Learned) -> Tensor:
    """Test inputs of the newest experience."""
    tests = learned.finished.stream[-1].test.tensors
    assert tests is not None
    return tests["input"].to(learned.finished.runtime.torch_device)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
