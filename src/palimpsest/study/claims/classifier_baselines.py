"""Measurements for the claims of the baselines of classifier unlearning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.forget import forget
from palimpsest.forget.classifier.salun import saliency_mask
from palimpsest.forget.classifier.scrub import SCRUB, students
from palimpsest.forget.classifier.scrub_rewind import error_rate
from palimpsest.study.claims.measuring import Setting, measurement

SAME_TRAINING: dict[str, Any] = {"epochs": 10, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
"""Of fine-tuning and l1-sparse where they are compared."""
RATIO = 0.5
NEAR = 0.05
"""How near to the reference the forget error of a rewound epoch must be, where one is."""
SCHEDULE: dict[str, Any] = {"epochs": 6, "msteps": 4, "lr": 5e-4}
"""Of SCRUB where it is rewound: gentle, so that the forget error passes by the reference."""


@measurement("classifier-baselines.salun-wrongly-moved")
def salun_wrongly_moved(setting: Setting) -> float:
    """Number of weights that SalUn moved outside its mask, or left where they were inside it."""
    original = copy.deepcopy(setting.original)
    batches = setting.runtime.batches(setting.split.forget, setting.task, 64)
    mask = saliency_mask(original, batches, setting.task, RATIO)
    after = _forgotten(setting, "salun", ratio=RATIO)
    wrong = 0
    for (name, before), now in zip(original.named_parameters(), after.parameters(), strict=True):
        wrong += int(((before != now) != mask[name]).sum())
    return float(wrong)


@measurement("classifier-baselines.salun-share-moved")
def salun_share_moved(setting: Setting) -> float:
    """Share of all weights that SalUn moved."""
    return _share_moved(setting.original, _forgotten(setting, "salun", ratio=RATIO))


@measurement("classifier-baselines.cf-k-early-moved")
def cf_k_early_moved(setting: Setting) -> float:
    """Number of values (parameters and buffers) before the last layer that CF-1 changed."""
    return _early_moved(setting, "cf-k")


@measurement("classifier-baselines.eu-k-early-moved")
def eu_k_early_moved(setting: Setting) -> float:
    """The same for EU-1."""
    return _early_moved(setting, "eu-k")


@measurement("classifier-baselines.l1-shrinkage")
def l1_shrinkage(setting: Setting) -> float:
    """By which share the weights' sum of absolute values is smaller after l1-sparse than after fine-tuning."""
    plain = _forgotten(setting, "finetune", **SAME_TRAINING)
    sparse = _forgotten(setting, "l1-sparse", **SAME_TRAINING)
    return 1 - _absolute_sum(sparse) / _absolute_sum(plain)


@measurement("classifier-baselines.fisher-largest-change")
def fisher_largest_change(setting: Setting) -> float:
    """Largest change of any weight by Fisher noise with alpha = 1e-30, the rows of the class not drawn anew."""
    after = _forgotten(setting, "fisher-noise", alpha=1e-30, reset_rows=False)
    pairs = zip(setting.original.parameters(), after.parameters(), strict=True)
    return max(float((before - now).detach().abs().max()) for before, now in pairs)


@measurement("classifier-baselines.rewind-gap")
def rewind_gap(setting: Setting) -> float:
    """Distance of the forget error of SCRUB+R from the reference; 0 where no epoch was near it."""
    errors, reference = _epochs(setting)
    if min(abs(error - reference) for error in errors) > NEAR:
        return 0.0
    rewound = _forgotten(setting, "scrub-r", **SCHEDULE)
    return abs(error_rate(rewound, setting.split.forget, setting.task, setting.runtime) - reference)  # pyright: ignore[reportArgumentType]


@measurement("classifier-baselines.rewind-nearest")
def rewind_nearest(setting: Setting) -> float:
    """Distance of the nearest epoch's forget error from the reference."""
    errors, reference = _epochs(setting)
    return min(abs(error - reference) for error in errors)


def _forgotten(setting: Setting, method: str, **settings: Any) -> nn.Module:
    return forget(setting.original, setting.split, method, setting.task, runtime=setting.runtime, **settings)


def _share_moved(before: nn.Module, after: nn.Module) -> float:
    pairs = [
        (old.detach(), new.detach()) for old, new in zip(before.parameters(), after.parameters(), strict=True)
    ]
    moved = sum(int((old != new).sum()) for old, new in pairs)
    return moved / sum(old.numel() for old, _ in pairs)


def _early_moved(setting: Setting, method: str) -> float:
    before = setting.original.state_dict()
    after = _forgotten(setting, method, k=1).state_dict()
    early = [name for name in before if not name.startswith("head.")]
    return float(sum(int((before[name] != after[name]).sum()) for name in early))


def _absolute_sum(model: nn.Module) -> float:
    parts: list[Tensor] = [parameter.detach().abs().sum() for parameter in model.parameters()]
    return float(torch.stack(parts).sum())


def _epochs(setting: Setting) -> tuple[list[float], float]:
    """Forget error of SCRUB after every epoch, and the error of the last on unseen records of its classes."""
    split, task, runtime = setting.split, setting.task, setting.runtime
    if split.holdout is None:
        raise InvalidRecords("Rewinding needs held-out records.")
    errors: list[float] = []
    student = setting.original
    for student in students(SCRUB(**SCHEDULE), setting.original, split, task, runtime):  # pyright: ignore[reportArgumentType]
        errors.append(error_rate(student, split.forget, task, runtime))  # pyright: ignore[reportArgumentType]
    unseen: Records = split.holdout
    classes = set(split.forget.column("label").tolist())
    alike = [label in classes for label in unseen.column("label").tolist()]
    return errors, error_rate(student, unseen.select(alike), task, runtime)  # pyright: ignore[reportArgumentType]
