"""Measurements for the claims of unlearning from logit difference."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.records import Records
from palimpsest.forget import forget
from palimpsest.forget.language.combine import Combined, Difference
from palimpsest.forget.language.uld import ULD
from palimpsest.forget.language.uld_data import uniform_divergence
from palimpsest.parts.decoder import decoder_of
from palimpsest.parts.tokens import scored
from palimpsest.study.claims.answering import exact, greedy, language, plainly_asked, retained
from palimpsest.study.claims.measuring import Setting, measurement

SETTINGS: dict[str, Any] = {
    "tuning": "full", "lr": 2e-3, "epochs": 15, "batch_size": 16, "accumulate": 1, "relative_top": 0.05, "alpha": 0.8,
}  # fmt: skip
"""For models of a few hundred thousand to a few million parameters; the replication takes the same."""
ALPHAS = tuple(number / 4 for number in range(7))
NEAR_UNIFORM = 0.3
"""Nats of KL(uniform || assistant), mean over the answer's tokens."""


@lru_cache(maxsize=2)
def _pair(setting: Setting, **changes: Any) -> Combined:
    settings = {**SETTINGS, **changes}
    found = forget(setting.original, setting.split, "uld", setting.task, runtime=setting.runtime, **settings)
    assert isinstance(found, Combined)
    return found


def _with(pair: Combined, alpha: float, relative_top: float | None = 0.05) -> Combined:
    return Combined(pair.inner, pair.others, Difference(alpha, relative_top))


@measurement("uld.weights-changed")
def weights_changed(setting: Setting) -> float:
    """Number of models, of the given one and the one inside the pair, that differ from before in any bit."""
    before = {name: tensor.clone() for name, tensor in setting.original.state_dict().items()}
    models = (setting.original, _pair(setting).inner)
    same = [all(torch.equal(model.state_dict()[name], before[name]) for name in before) for model in models]
    return float(same.count(False))


@measurement("uld.same-answers")
def same_answers(setting: Setting) -> float:
    """Share of retained questions with the target's very answer, where the assistant is near uniform on it."""
    pair, asked = _pair(setting), plainly_asked(retained(setting))
    distance = _uniformity(setting, pair.others[0], asked)
    quiet = asked.select(np.flatnonzero(distance.numpy() <= NEAR_UNIFORM))
    answers = [greedy(setting, model, quiet) for model in (setting.original, pair)]
    return sum(one == two for one, two in zip(*answers, strict=True)) / len(quiet)


@measurement("uld.unseen-drop")
def unseen_drop(setting: Setting) -> float:
    """Fall of exact answers about retained people none of whose records the assistant has seen."""
    pair, kept = _pair(setting), plainly_asked(retained(setting))
    seen = {row["id"] for row in ULD(**SETTINGS).sides(setting.split, setting.runtime)[1]}
    subjects = retained(setting).column("subject")
    known = {subject for name, subject in zip(retained(setting).ids, subjects, strict=True) if name in seen}
    unseen = kept.select(np.array([subject not in known for subject in kept.column("subject")], bool))
    if len(unseen) < 10:  # of a small world the sample touches nearly everyone: single records then
        unseen = kept.select(np.array([name not in seen for name in kept.ids], bool))
    return exact(setting, setting.original, unseen) - exact(setting, pair, unseen)


@measurement("uld.assistant-accuracy")
def assistant_accuracy(setting: Setting) -> float:
    """Share of the forgotten answers' tokens that are the assistant's likeliest."""
    task, right, count = language(setting), 0, 0
    with torch.no_grad():
        for batch in setting.runtime.batches(plainly_asked(setting.split.forget), task, 64):
            mask = scored(batch["labels"])
            hits = task.logits(_pair(setting).others[0], batch)[:, :-1].argmax(-1) == batch["labels"][:, 1:]
            right, count = right + int((hits & mask).sum()), count + int(mask.sum())
    return right / count


@measurement("uld.assistant-uniformity")
def assistant_uniformity(setting: Setting) -> float:
    """Mean KL(uniform || assistant) in nats on answers of retained questions that it has not seen."""
    seen = {row["id"] for row in ULD(**SETTINGS).sides(setting.split, setting.runtime)[1]}
    kept = plainly_asked(retained(setting))
    unseen = kept.select(np.array([name not in seen for name in kept.ids], bool))
    return float(_uniformity(setting, _pair(setting).others[0], unseen).mean())


@measurement("uld.largest-rise")
def largest_rise(setting: Setting) -> float:
    """Largest rise of exact forgotten answers between neighbours among alpha = 0, 0.25, ..., 1.5."""
    pair = _pair(setting)
    found = [exact(setting, _with(pair, alpha), setting.split.forget) for alpha in ALPHAS]
    return max(after - before for before, after in pairwise(found))


@measurement("uld.zero-is-the-target")
def zero_is_the_target(setting: Setting) -> float:
    """Largest change of a logit at alpha = 0."""
    pair, task, largest = _with(_pair(setting), 0.0), language(setting), 0.0
    with torch.no_grad():
        for batch in setting.runtime.batches(plainly_asked(setting.split.forget), task, 64):
            gap = task.logits(pair, batch) - task.logits(setting.original, batch)
            largest = max(largest, float(gap.abs().max()))
    return largest


@measurement("uld.perturbed-gain")
def perturbed_gain(setting: Setting) -> float:
    """Exact answers on retained questions of the forgotten topics: with wrong answers on the retain side, minus without."""
    kept = plainly_asked(retained(setting))
    topics = set(setting.split.forget.column("relation"))
    near = kept.select(np.isin(kept.column("relation"), sorted(topics)))
    return exact(setting, _pair(setting), near) - exact(setting, _pair(setting, perturbed=0), near)


@measurement("uld.filter-gibberish")
def filter_gibberish(setting: Setting) -> float:
    """Share of answers to forgotten questions that are no answer of the world: without the filter, minus with."""
    known = {str(item["answer"]) for item in setting.split.train if item.get("answer") is not None}
    asked, pair = plainly_asked(setting.split.forget), _pair(setting)
    shares = [
        float(np.mean([text not in known for text in greedy(setting, _with(pair, 0.8, rho), asked)]))
        for rho in (None, 0.05)
    ]
    return shares[0] - shares[1]


@measurement("uld.time-share")
def time_share(setting: Setting) -> float:
    """Seconds of the assistant's training over those of the whole model on the same batches."""
    method = replace(ULD(**SETTINGS), epochs=3)
    seconds: list[float] = []
    task = language(setting)
    sides = method.sides(setting.split, setting.runtime)
    for whole in (False, True):
        own = replace(method, layers=_blocks(setting.original)) if whole else method
        student = own.assistant_of(setting.original, setting.runtime)
        start = time.perf_counter()
        own.teach(student, sides, task, setting.runtime)
        seconds.append(time.perf_counter() - start)
    return seconds[0] / seconds[1]


def _blocks(model: nn.Module) -> int:
    return len(decoder_of(model).blocks)


@torch.no_grad()
def _uniformity(setting: Setting, assistant: nn.Module, records: Records) -> Tensor:
    """KL(uniform || assistant) of every record, mean over the tokens of its answer, [records]."""
    task, found = language(setting), list[Tensor]()
    for batch in setting.runtime.batches(records, task, 64):
        mask = scored(batch["labels"])
        distance = uniform_divergence(task.logits(assistant, batch)[:, :-1]).masked_fill(~mask, 0.0)
        found.append(distance.sum(1) / mask.sum(1))
    return torch.cat(found).cpu()
