"""Measurements for the claims of representation-level evaluation."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import palimpsest.audit as audit_verb
from palimpsest.audit.feature_sets import pass_over
from palimpsest.audit.forget_lists import forget_list
from palimpsest.audit.set_measures import mean_cka, neighbours_on_set
from palimpsest.core.errors import MissingNeed
from palimpsest.core.records import Records
from palimpsest.data import load_data
from palimpsest.forget import forget
from palimpsest.parts.cka import linear_cka
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import fit, recipe_of
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.study.planted import PlantedHead

DOWNSTREAM = (8, 9)
"""The downstream task: bags against ankle boots of Fashion-MNIST; the source task are the other classes."""
COUNT = 2
"""Classes that are forgotten."""
ASCENT = 1e-3
"""Learning rate of Adam in unbounded ascent."""


@measurement("representation-evaluation.cheat-suppressed")
def cheat_suppressed(setting: Setting) -> float:
    """1 if the verdict on a masked head is "suppressed", by utility and this protocol alone."""
    cheat = PlantedHead().unlearn(setting.original, setting.split, setting.task, setting.runtime)
    control = _control(setting)
    report = audit_verb.audit(
        cheat, setting.split, setting.task, setting.original, control, ["utility", "uuef"],
        runtime=setting.runtime,
    )  # fmt: skip
    return float(report.verdict == "suppressed")


@measurement("representation-evaluation.ascent-fall")
def ascent_fall(setting: Setting) -> float:
    """By how much ascent without a bound takes CKA to a retrained model, on retained records, below the original's."""
    if setting.split.retain is None:
        raise MissingNeed("The claim needs retained records.")
    control = _control(setting)
    wreck = forget(
        setting.original, setting.split, "gradient-ascent", setting.task, runtime=setting.runtime,
        lr=ASCENT, epochs=10, clip=None, stop_accuracy=None,
    )  # fmt: skip
    seen = [
        pass_over(model, setting.split.retain, setting.task, setting.runtime).features
        for model in (setting.original, wreck, control)
    ]
    return mean_cka(seen[0], seen[2])[0] - mean_cka(seen[1], seen[2])[0]


@measurement("representation-evaluation.invariance-error")
def invariance_error(setting: Setting) -> float:
    """Largest change of CKA under rotation, scaling and a constant shift of the features."""
    x, random = _features(setting), torch.Generator().manual_seed(setting.runtime.derive("rotation"))
    y = x[:, torch.randperm(x.shape[1], generator=random)] + torch.randn(
        x.shape, generator=random, dtype=x.dtype
    )
    rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=random, dtype=x.dtype))[0]
    before = linear_cka(x, y)
    moved = (y @ rotation, 37.0 * y, 0.01 * y, y + 5.0, 3.0 * (y @ rotation) - 2.0)
    return max(abs(linear_cka(x, x) - 1), *(abs(linear_cka(x, one) - before) for one in moved))


@measurement("representation-evaluation.linear-map-change")
def linear_map_change(setting: Setting) -> float:
    """How far a general linear map of the features takes CKA from 1."""
    x = _features(setting)
    stretch = torch.ones(x.shape[1], dtype=x.dtype)
    stretch[int(x.var(0).argsort()[x.shape[1] // 2])] = 100.0
    return 1 - linear_cka(x, x * stretch)


@measurement("representation-evaluation.top-overlap")
def top_overlap(setting: Setting) -> float:
    """How many of sandal and sneaker are on the list of classes nearest to bags and boots."""
    return float(len({5, 7} & set(_top(setting))))


@measurement("representation-evaluation.transfer-loss")
def transfer_loss(setting: Setting) -> float:
    """Downstream neighbours of a model retrained without random classes minus without the nearest ones."""
    top = _top(setting)
    others = [label for label in _source_labels() if label not in top]
    random = forget_list(
        setting.original, _source(setting), setting.task, COUNT, kind="random", runtime=setting.runtime,
        among=others,
    )  # fmt: skip
    without_random, without_top = (_transfer(_retrained(setting, gone), setting) for gone in (random, top))
    return without_random - without_top


def _control(setting: Setting) -> nn.Module:
    """A retrained model, with a seed that no cell has."""
    later = setting.runtime.with_seed(setting.runtime.derive("control"))
    return forget(setting.original, setting.split, "retrain", setting.task, runtime=later)


def _features(setting: Setting) -> torch.Tensor:
    return pass_over(setting.original, setting.split.forget, setting.task, setting.runtime).features


def _top(setting: Setting) -> list[int]:
    return forget_list(
        setting.original, _source(setting), setting.task, COUNT, _downstream(), runtime=setting.runtime
    )


def _retrained(setting: Setting, gone: list[int]) -> nn.Module:
    """A model of the source task, trained as the original was, without some classes."""
    recipe = recipe_of(setting.original)
    if recipe is None:
        raise MissingNeed("The claim needs an original that says how it was trained.")
    records = _source(setting)
    kept = records.select(~np.isin(records.column("label"), gone))
    start = reinitialised(setting.original, setting.runtime)
    return fit(copy.deepcopy(start), kept, setting.task, setting.runtime, recipe)


def _transfer(model: nn.Module, setting: Setting) -> float:
    downstream = _downstream()
    rows = pass_over(model, downstream, setting.task, setting.runtime).features.numpy()
    return neighbours_on_set(rows, downstream.column("label"))[0]


def _source_labels() -> list[int]:
    return [label for label in range(10) if label not in DOWNSTREAM]


def _source(setting: Setting) -> Records:
    records = setting.split.train
    return records.select(np.isin(records.column("label"), _source_labels()))


def _downstream() -> Records:
    """Bags and boots of the test images, which no model was trained on."""
    records = load_data("fashion-mnist", part="test")
    return records.select(np.isin(records.column("label"), DOWNSTREAM))
