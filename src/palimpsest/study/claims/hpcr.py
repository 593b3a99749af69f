"""Measurements for the claims of PCR and HPCR."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from palimpsest.retain.cosine import class_vectors
from palimpsest.retain.learner import build_learner
from palimpsest.retain.methods.hpcr import wave
from palimpsest.retain.methods.pcr import proxy_contrast
from palimpsest.retain.running import Run
from palimpsest.study.claims.learned import Learned, learned_measurement

OFF: Mapping[str, float | None] = {
    "sample_pairs_from": None, "tau_min": 1.0, "tau_max": 1.0, "class_distillation": 0.0, "sample_distillation": 0.0,
}  # fmt: skip


@learned_measurement("hpcr.switched-off-gap")
def switched_off_gap(learned: Learned) -> float:
    """Largest difference of the weights of HPCR without its components and PCR, after two experiences."""
    plain = learned.fresh
    memory = int(getattr(plain.learner, "memory", 200))
    ends: list[Tensor] = []
    for name, settings in (("pcr", {}), ("hpcr", OFF)):
        start = learned.fresh
        learner = build_learner(name, {"memory": memory, **settings})
        run = Run(
            learner, start.stream, start.learner.student.model, training=start.training, runtime=start.runtime
        )
        with run.runtime.limited():
            run.advance()
            run.advance()
        ends.append(torch.cat([value.detach().flatten() for value in run.learner.student.model.parameters()]))
    return float((ends[0] - ends[1]).abs().max())


@learned_measurement("hpcr.absent-gradient")
def absent_gradient(learned: Learned) -> float:
    """Largest entry of the PCR loss's gradient on class vectors of classes that are not in the batch."""
    features, vectors, labels = _rows(learned.finished)
    present = labels < 4
    vectors.requires_grad_()
    loss = proxy_contrast(features[present], vectors, labels[present], 0.09)
    (gradient,) = torch.autograd.grad(loss, [vectors])
    return float(gradient[4:].abs().max())


@learned_measurement("hpcr.wave-error")
def wave_error(learned: Learned) -> float:
    """Largest error of the factor at steps 0, 250 and 500, against its ends."""
    expected = {0: 0.5625, 250: 1.8, 500: 0.5625}
    return max(abs(wave(step, 1.8, 0.5625) - value) for step, value in expected.items())


@learned_measurement("hpcr.order-gap")
def order_gap(learned: Learned) -> float:
    """Difference of the PCR loss of forty records and that of the same records in reverse order."""
    features, vectors, labels = _rows(learned.finished)
    one, other = (proxy_contrast(features[o], vectors, labels[o], 0.09) for o in _orders(len(labels)))
    return abs(float(one - other))


def _orders(count: int) -> tuple[Tensor, Tensor]:
    chosen = torch.linspace(0, count - 1, 40).long()
    return chosen, chosen.flip(0)


@torch.no_grad()
def _rows(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Features and labels of all tests, and class vectors."""
    tests = [experience.test.tensors for experience in run.stream]
    inputs, labels = (torch.cat([test[name] for test in tests if test]) for name in ("input", "label"))
    student, place = run.learner.student, run.runtime.torch_device
    return (
        student.features({"input": inputs.to(place)}).detach(),
        class_vectors(student).detach().clone(),
        labels.to(place),
    )
