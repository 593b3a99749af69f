"""Measurements for the claims of MUSE."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.split import ForgetSplit, in_turn
from palimpsest.forget import forget
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.language.gradient_difference import GradientAscent, GradientDifference
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.suites.muse import WORLD
from palimpsest.suites.muse_audit import Muse, MuseSets
from palimpsest.suites.muse_checkpoints import first_below, retrained_knowmem
from palimpsest.suites.muse_scores import knowmem
from palimpsest.tasks.language import Language

SETTINGS = Muse(**WORLD)
FOLDS = 4
"""Requests of a sequence."""
TRAINING: dict[str, Any] = {"batch_size": 16, "warmup": 0.0, "schedule": "constant"}
ASCENT = GradientAscent(lr=3e-4, epochs=2, **TRAINING)
WITH_RETAIN = GradientDifference(lr=3e-4, epochs=2, **TRAINING)
"""What is done at every request of a sequence: the same steps, with and without a retain term."""
LONG: dict[str, Any] = {"lr": 3e-4, "epochs": 10, **TRAINING}
"""Of runs from which a checkpoint is chosen."""


@measurement("muse.ascent-fall")
def ascent_fall(setting: Setting) -> float:
    """Points of utility that plain gradient ascent loses from the first to the fourth request in turn."""
    first, *_, last = _utilities(setting, ASCENT)
    return first - last


@measurement("muse.retain-term-gain")
def retain_term_gain(setting: Setting) -> float:
    """Points of utility that the retain term keeps after four requests, over plain ascent."""
    return _utilities(setting, WITH_RETAIN)[-1] - _utilities(setting, ASCENT)[-1]


@measurement("muse.retraining-fall")
def retraining_fall(setting: Setting) -> float:
    """Points of utility between retraining without the first fold and without all four."""
    turns = _turns(setting)
    people = _asked(turns)
    scores: list[float] = []
    for turn in (turns[0], _together(turns)):
        model = forget(
            copy.deepcopy(setting.original), turn, "retrain", _task(setting), runtime=setting.runtime
        )
        scores.append(_utility(setting, model, people))
    return scores[0] - scores[1]


@measurement("muse.checkpoint-gap")
def checkpoint_gap(setting: Setting) -> float:
    """By how many epochs the stopping rule ends gradient ascent earlier than ascent with a KL retain term."""
    task = _task(setting)
    threshold = retrained_knowmem(setting.original, setting.split, task, setting.runtime, SETTINGS)
    methods: tuple[GradientMethod, ...] = (GradientAscent(**LONG), GradientDifference(retain="kl", **LONG))
    ends = [
        len(
            first_below(method, setting.original, setting.split, task, setting.runtime, threshold, SETTINGS)[
                1
            ]
        )
        for method in methods
    ]
    return float(ends[1] - ends[0])


@measurement("muse.zero-scale-change")
def zero_scale_change(setting: Setting) -> float:
    """Largest change of a logit by a task vector and by WHP of scale 0: neither may change anything."""
    task = _task(setting)
    batch = setting.runtime.to_device(task.collate([setting.split.forget[at] for at in range(4)]))
    settings: dict[str, Any] = {"epochs": 1, "lr": 1e-3, **TRAINING}
    changed = [
        forget(setting.original, setting.split, name, task, runtime=setting.runtime, scale=0.0, **settings)
        for name in ("task-vector", "whp")
    ]
    with torch.no_grad():
        original = task.logits(setting.runtime.place(copy.deepcopy(setting.original)).eval(), batch)
        gaps = [float((task.logits(model, batch) - original).abs().max()) for model in changed]
    return max(gaps)


def _task(setting: Setting) -> Language:
    if not isinstance(setting.task, Language):
        raise InvalidRecords(f"MUSE is about language, the task is {setting.task.name}.")
    return setting.task


def _turns(setting: Setting) -> list[ForgetSplit]:
    """Requests for the first folds of people, one after the other."""
    train = setting.split.train
    if not train.has_column("fold"):
        raise InvalidRecords("Sequential requests need records with a column 'fold'.")
    folds = train.column("fold")
    whole = [
        ForgetSplit(
            train.select(folds == fold), train.select(folds != fold), setting.split.test, setting.split.holdout,
            f"fold {fold}",
        )
        for fold in range(FOLDS)
    ]  # fmt: skip
    return in_turn(whole)


def _together(turns: Sequence[ForgetSplit]) -> ForgetSplit:
    """All requests at once."""
    gone = turns[0].forget
    for turn in turns[1:]:
        gone = gone.union(turn.forget)
    return replace(turns[-1], forget=gone, description="all folds")


def _asked(turns: Sequence[ForgetSplit]) -> list[tuple[str, str]]:
    """Questions about people whom no request of the sequence is about, in words that nobody trains on."""
    test, last = turns[-1].test, turns[-1].retain
    assert test is not None and last is not None
    kept = set(last.column("subject")) - {""}
    mine = test.select(np.isin(test.column("subject"), list(kept)))
    return MuseSets(replace(turns[-1], test=mine), SETTINGS.items, 0).retain_questions


def _utilities(setting: Setting, method: GradientMethod) -> list[float]:
    """KnowMem on people who stay, after every request."""
    turns, model, found = _turns(setting), setting.original, list[float]()
    asked = _asked(turns)
    for turn in turns:
        model = method.unlearn(model, turn, _task(setting), setting.runtime)
        found.append(_utility(setting, model, asked))
    return found


def _utility(setting: Setting, model: nn.Module, asked: Sequence[tuple[str, str]]) -> float:
    questions = [question for question, _ in asked]
    given = _task(setting).generate(
        setting.runtime.place(model), questions, max_new_tokens=SETTINGS.answer_tokens
    )
    return knowmem([texts[0] for texts in given], [answer for _, answer in asked]).value
