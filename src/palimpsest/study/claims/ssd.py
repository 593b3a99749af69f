"""Measurements for the claims of Selective Synaptic Dampening and its label-free variant."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.forget import forget
from palimpsest.parts.importance import Measure, measure_importance
from palimpsest.study.claims.measuring import Setting, measurement

ALPHA = 10.0


@measurement("ssd.zeroing-errors")
def zeroing_errors(setting: Setting) -> float:
    """Number of weights that a dampening constant of 0 sets wrongly.

    Right is zero where the importance for the forget set exceeds alpha times that for all training
    records, and the original value everywhere else, decided here weight by weight. Infinite if nothing
    is selected: then nothing was shown.
    """
    model, runtime = copy.deepcopy(setting.original), setting.runtime
    after = forget(
        setting.original, setting.split, "ssd", setting.task, runtime=runtime, alpha=ALPHA, dampening=0.0
    )
    full = measure_importance(model, setting.split.train, setting.task, runtime, Measure())
    forgotten = measure_importance(model, setting.split.forget, setting.task, runtime, Measure(shuffle=False))
    wrong = selected = 0
    for (name, before), now in zip(model.named_parameters(), after.parameters(), strict=True):
        chosen = forgotten[name] > ALPHA * full[name]
        selected += int(chosen.sum())
        wrong += int((torch.where(chosen, 0.0, before) != now).sum())
    return float(wrong) if selected else float("inf")


@measurement("lfssd.label-dependence")
def label_dependence(setting: Setting) -> float:
    """Number of weights that come out otherwise when every label is replaced by a wrong one.

    Infinite if no weight is changed at all: then nothing was shown.
    """
    results = [
        forget(setting.original, split, "lfssd", setting.task, runtime=setting.runtime, alpha=ALPHA)
        for split in (setting.split, _mislabelled(setting.split))
    ]
    moved = any(
        not torch.equal(a, b)
        for a, b in zip(results[0].parameters(), setting.original.parameters(), strict=True)
    )
    pairs = zip(results[0].parameters(), results[1].parameters(), strict=True)
    return float(sum(int((a != b).sum()) for a, b in pairs)) if moved else float("inf")


def _mislabelled(split: ForgetSplit) -> ForgetSplit:
    """The same records in the same order, every label another one."""
    train, tensors = split.train, split.train.tensors
    if tensors is None:
        raise InvalidRecords("The labels of records that do not lie in memory cannot be replaced.")
    labels = tensors["label"]
    changed = TensorDataset(tensors["input"], (labels + 1) % (int(labels.max()) + 1))
    records = Records(changed, ids=train.ids)
    forgotten = np.isin(np.asarray(train.ids, dtype=object), split.forget.ids)
    return ForgetSplit(records.select(forgotten), records.select(~forgotten))
