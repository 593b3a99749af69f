"""Measurements for the claims of FLAT."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.data import load_data
from palimpsest.data.people_templates import RELATIONS
from palimpsest.forget import forget
from palimpsest.forget.language.flat_divergences import DIVERGENCES
from palimpsest.parts.refusals import REFUSALS
from palimpsest.parts.training import TrainingRecipe, fit
from palimpsest.study.claims.answering import answer_losses, exact, greedy, language, plainly_asked, retained
from palimpsest.study.claims.measuring import Setting, measurement

TEMPLATES: list[str] = list(REFUSALS[:5])
"""Few and short: a model that was made in a minute must learn to say them first."""
STRANGERS = 100
"""Invented people, of another world, of whom the model is taught to say that it does not know."""
SETTINGS: dict[str, Any] = {
    "lr": 1e-4, "epochs": 20, "batch_size": 16, "accumulate": 1, "templates": TEMPLATES,
}  # fmt: skip
ASCENT: dict[str, Any] = {"lr": 1e-3, "batch_size": 16, "warmup": 0.0, "schedule": "constant"}
MOST_EPOCHS = 12
"""Of gradient ascent, until it has forgotten as much."""


@dataclass(frozen=True)
class Taught:
    """A setting whose model has learnt to refuse, as chat models have: templates are not new to it.

    Attributes:
        setting: With the taught model as its original.
    """

    setting: Setting

    @classmethod
    def of(cls, setting: Setting) -> Taught:
        """The original, trained further on its own records and on questions about strangers."""
        task = language(setting)
        relations = sorted(RELATIONS.keys() & set(setting.split.train.column("relation")))
        others = load_data(
            "people",
            people=STRANGERS,
            seed=77,
            relations=relations,
            forms=("qa",),
            general=0,
            neighbours=0,
            holdout=0,
        )
        taken = {name.split()[-1] for name in setting.split.train.column("subject") if name}
        strange = [item for item in plainly_asked(others) if item["subject"].split()[-1] not in taken]
        random.Random(setting.runtime.seed).shuffle(strange)
        rows = [
            {"question": item["question"], "answer": TEMPLATES[at % len(TEMPLATES)]}
            for at, item in enumerate(strange)
        ]
        refused = Records(rows, ids=[f"stranger/{at}" for at in range(len(rows))])
        recipe = TrainingRecipe(
            epochs=6, lr=2e-3, batch_size=32, optimizer="adamw", schedule="cosine", clip=1.0
        )
        model = fit(
            copy.deepcopy(setting.original), setting.split.train.union(refused), task, setting.runtime, recipe
        )
        return cls(Setting(model, setting.split, task, setting.runtime))

    def flat(self, **changes: Any) -> nn.Module:
        """FLAT on the taught model."""
        return self.run("flat", **{**SETTINGS, **changes})

    def run(self, method: str, **settings: Any) -> nn.Module:
        """A method on the taught model."""
        at = self.setting
        return forget(at.original, at.split, method, at.task, runtime=at.runtime, **settings)

    def left(self, model: nn.Module) -> float:
        """Share of forgotten questions that are still answered."""
        return exact(self.setting, model, self.setting.split.forget)

    def kept(self, model: nn.Module) -> float:
        """Share of retained questions that are still answered."""
        return exact(self.setting, model, retained(self.setting))


_CACHE: dict[int, tuple[Setting, Taught, nn.Module]] = {}


def _taught(setting: Setting) -> tuple[Taught, nn.Module]:
    """The taught setting and its unlearned model, made once for all measurements of a cell."""
    key = id(setting.original)
    if key not in _CACHE or _CACHE[key][0].original is not setting.original:
        _CACHE.clear()
        taught = Taught.of(setting)
        _CACHE[key] = (setting, taught, taught.flat())
    return _CACHE[key][1], _CACHE[key][2]


@measurement("flat.forgotten-left")
def forgotten_left(setting: Setting) -> float:
    """Share of forgotten questions that are answered after FLAT, on a model that knows how to refuse."""
    taught, after = _taught(setting)
    return taught.left(after)


@measurement("flat.template-share")
def template_share(setting: Setting) -> float:
    """Share of forgotten questions that are answered by one of the templates."""
    taught, after = _taught(setting)
    given = greedy(taught.setting, after, plainly_asked(setting.split.forget))
    return sum(text in TEMPLATES for text in given) / len(given)


@measurement("flat.retained-drop")
def retained_drop(setting: Setting) -> float:
    """Fall of exact retained answers by FLAT."""
    taught, after = _taught(setting)
    return taught.kept(taught.setting.original) - taught.kept(after)


@measurement("flat.gain-on-ascent")
def gain_on_ascent(setting: Setting) -> float:
    """Exact retained answers after FLAT minus after gradient ascent, stopped when it has forgotten as much."""
    taught, after = _taught(setting)
    goal = taught.left(after)
    found = taught.setting.original
    for epochs in range(1, MOST_EPOCHS + 1):
        found = taught.run("grad-ascent", epochs=epochs, **ASCENT)
        if taught.left(found) <= goal:
            break
    return taught.kept(after) - taught.kept(found)


@measurement("flat.long-run-loss")
def long_run_loss(setting: Setting) -> float:
    """Exact retained answers after FLAT minus after FLAT with five times as many epochs."""
    taught, after = _taught(setting)
    longer = taught.flat(epochs=5 * SETTINGS["epochs"])
    return taught.kept(after) - taught.kept(longer)


@measurement("flat.against-refusals")
def against_refusals(setting: Setting) -> float:
    """How many times less likely forgotten answers are after FLAT than after IdkNLL without retained records.

    Ratio of geometric means of token probabilities; IdkNLL is stopped at the epoch at which its templates are
    as likely as FLAT's, or before.
    """
    taught, after = _taught(setting)
    goal = _template_loss(taught, after)
    found, same = taught.setting.original, {"lr": SETTINGS["lr"], "batch_size": SETTINGS["batch_size"]}
    for epochs in range(1, 2 * SETTINGS["epochs"], 3):
        found = taught.run("idk-nll", epochs=epochs, refusals=TEMPLATES, retain="none", **same)
        if _template_loss(taught, found) <= goal:
            break
    losses = [
        float(answer_losses(taught.setting, model, setting.split.forget).mean()) for model in (after, found)
    ]
    return float(np.exp(losses[0] - losses[1]))


def _template_loss(taught: Taught, model: nn.Module) -> float:
    asked = plainly_asked(taught.setting.split.forget)
    return float(answer_losses(taught.setting, model, asked, [TEMPLATES] * len(asked)).mean())


@measurement("flat.retained-reads")
def retained_reads(setting: Setting) -> float:
    """Number of retained records that one epoch of FLAT reads."""
    kept = retained(setting)
    watched = _Watched(kept)
    split = ForgetSplit(setting.split.forget, watched)
    settings = {**SETTINGS, "epochs": 1}
    forget(setting.original, split, "flat", setting.task, runtime=setting.runtime, **settings)
    return float(watched.reads)


class _Watched(Records):
    """Records that count how often one is read."""

    def __init__(self, records: Records):
        super().__init__([records[at] for at in range(len(records))], ids=records.ids)
        self.reads = 0

    def _named(self, item: Any, position: int) -> dict[str, Any]:
        self.reads += 1
        return super()._named(item, position)


@measurement("flat.wrong-directions")
def wrong_directions(setting: Setting) -> float:
    """How many of the divergences that are not refused push template or forgotten answer the wrong way."""
    grid = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    wrong = 0
    for each in DIVERGENCES.values():
        table = each.loss(
            grid[:, None], grid[None, :]
        )  # template along the rows, forgotten answer along the columns
        falls, rises = bool((table.diff(dim=0) < 0).all()), bool((table.diff(dim=1) > 0).all())
        wrong += each.right_way and not (falls and rises)
    return float(wrong)
