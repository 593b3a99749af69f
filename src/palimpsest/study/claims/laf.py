"""Measurements for the claims of label-agnostic forgetting."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidRecords, MissingNeed
from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.forget import forget
from palimpsest.forget.classifier.laf import representations
from palimpsest.forget.classifier.laf_r import repair_head
from palimpsest.parts.cka import linear_cka
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.tasks.classification import Classification

LAYER = "fc"
"""Of the small CNN: its output is the representation before the ReLU."""


@measurement("laf.repair-alone")
def repair_alone(setting: Setting) -> float:
    """Test accuracy on the forgotten class after the repair of the original's head, without LAF before it."""
    student = setting.runtime.place(copy.deepcopy(setting.original))
    repair_head(student, _retained(setting.split), _task(setting), setting.runtime)
    test = setting.split.test
    if test is None or not setting.split.forgotten_labels:
        raise InvalidRecords("The claim needs test records of a class forgotten as a whole.")
    gone = test.select(setting.split.like_forgotten(test))
    right = 0
    with torch.no_grad():
        for batch in setting.runtime.batches(gone, setting.task):
            right += int((setting.task.logits(student, batch).argmax(1) == batch["label"]).sum())
    return right / len(gone)


@measurement("laf.label-dependence")
def label_dependence(setting: Setting) -> float:
    """Number of weights that come out otherwise when every label is shuffled, or the same.

    Infinite if no weight is changed at all: then nothing was shown.
    """
    method = {"steps": 20}
    found = [
        forget(setting.original, split, "laf", setting.task, runtime=setting.runtime, **method)
        for split in (setting.split, _relabelled(setting, True), _relabelled(setting, False))
    ]
    weights = [nn.utils.parameters_to_vector(model.parameters()) for model in found]
    if torch.equal(weights[0], nn.utils.parameters_to_vector(setting.original.parameters())):
        return float("inf")
    return float(sum(int((other != weights[0]).sum()) for other in weights[1:]))


@measurement("laf.cosine-gap")
def cosine_gap(setting: Setting) -> float:
    """Mean cosine of representations with the original's after the defaults: of retained minus of forget records."""
    after = forget(setting.original, setting.split, "laf", setting.task, runtime=setting.runtime)
    kept, gone = (
        F.cosine_similarity(
            _representations(setting.original, part, setting, None),
            _representations(after, part, setting, None),
        )
        for part in (_retained(setting.split), setting.split.forget)
    )
    return float(kept.mean() - gone.mean())


@measurement("laf.cka-gain")
def cka_gain(setting: Setting) -> float:
    """Linear CKA with a retrained model on the forget records: of the unlearned model minus of the original."""
    retrained = forget(setting.original, setting.split, "retrain", setting.task, runtime=setting.runtime)
    truth, new, old = (
        _representations(model, setting.split.forget, setting)
        for model in (retrained, _unlearned(setting), setting.original)
    )
    return linear_cka(new, truth) - linear_cka(old, truth)


def _unlearned(setting: Setting) -> nn.Module:
    """After 160 steps with a linear decoder, the recipe's setting that a repair follows."""
    return forget(
        setting.original, setting.split, "laf", setting.task, runtime=setting.runtime, steps=160,
        lr_unlearning=1e-3, lr_alignment=3e-4, temperature=20.0, decoder="linear", layer=LAYER,
    )  # fmt: skip


def _representations(
    model: nn.Module, records: Records, setting: Setting, layer: str | None = LAYER
) -> torch.Tensor:
    return representations(model, records, _task(setting), setting.runtime, layer)


def _relabelled(setting: Setting, shuffle: bool) -> ForgetSplit:
    """The same request with labels in random order, or all 0."""
    random = setting.runtime.numpy("laf shuffled labels")

    def changed(records: Records) -> Records:
        if records.tensors is None:
            raise InvalidRecords("The claim needs records in memory.")
        labels = records.tensors["label"]
        new = (
            labels[torch.from_numpy(random.permutation(len(labels)))] if shuffle else torch.zeros_like(labels)
        )
        return Records(TensorDataset(records.tensors["input"], new), ids=records.ids)

    return ForgetSplit(changed(setting.split.forget), changed(_retained(setting.split)))


def _retained(split: ForgetSplit) -> Records:
    if split.retain is None:
        raise MissingNeed("The claim needs retained records.")
    return split.retain


def _task(setting: Setting) -> Classification:
    if not isinstance(setting.task, Classification):
        raise InvalidRecords("The claims are on a classifier.")
    return setting.task
