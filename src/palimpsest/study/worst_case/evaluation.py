"""How retraining and methods fare on a set: UA, MIA, RA, TA, and the average gap to retraining.

As the paper prints them: UA = 1 - accuracy on the forget set; MIA = share of the forget set that an SVC (radial
basis functions, C = 3) on the confidence in the true class, fitted on retained (member) against test records,
calls NON-member; RA = accuracy on the retained records; TA = on the test records (without classes that are
forgotten as a whole); average gap = mean over the four of |method - retrained model|. All are shares, not
percentages. On a worst-case set UA and MIA of the RETRAINED model are low: it still fits what it never saw.

Hyperparameters must not be chosen on the worst-case set: of several candidates the one with the smallest
average gap on a RANDOM set of the same size is taken, and used on every set.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from palimpsest.audit.membership.population import svc_attack
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import require
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.forget import build_unlearner, forget, needs_met
from palimpsest.parts.training import TrainingRecipe, recipe_of
from palimpsest.study.plan import RETRAIN
from palimpsest.study.recipe import Method, content_hash
from palimpsest.study.worst_case.baselines import RANDOM
from palimpsest.study.worst_case.record import model_fingerprint

METRICS = ("ua", "mia", "ra", "ta")
MOST_ATTACKED = 1000
"""Records a side that the support-vector machine is fitted on."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """What is measured of one model on one set; shares.

    Attributes:
        ua: 1 - accuracy on the forget set.
        mia: Share of the forget set called non-member.
        ra: Accuracy on the retained records.
        ta: Accuracy on the test records of classes that stay.
        forget_loss: Mean loss on the forget set.
    """

    ua: float
    mia: float
    ra: float
    ta: float
    forget_loss: float

    def gap(self, other: Scores) -> float:
        """Mean over UA, MIA, RA and TA of the absolute differences."""
        return fmean(abs(getattr(self, name) - getattr(other, name)) for name in METRICS)


def measure(model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> Scores:
    """UA, MIA, RA and TA of a model on a request.

    Raises:
        MissingNeed: If retained or test records are not at hand.
    """
    if split.retain is None or split.test is None:
        raise MissingNeed("UA, MIA, RA and TA need retained and test records.")
    test = split.test.select(~split.like_forgotten(split.test))
    if len(test) < 2:
        raise InvalidRecords("Fewer than 2 test records are of classes that stay.")
    gone, kept, out = (_outputs(model, part, task, runtime) for part in (split.forget, split.retain, test))
    size = min(MOST_ATTACKED, len(split.retain), len(test))
    random = runtime.numpy("membership attack")
    members = np.sort(random.permutation(len(split.retain))[:size])
    others = np.sort(random.permutation(len(test))[:size])
    return Scores(
        ua=1 - float(gone.right.mean()),
        mia=svc_attack(
            kept.confidence[members, None], out.confidence[others, None], gone.confidence[:, None]
        ),
        ra=float(kept.right.mean()),
        ta=float(out.right.mean()),
        forget_loss=float(gone.loss.mean()),
    )


@dataclass(frozen=True)
class _Outputs:
    right: np.ndarray
    confidence: Float[np.ndarray, " records"]
    loss: Float[np.ndarray, " records"]


@torch.no_grad()
def _outputs(model: nn.Module, records: Records, task: Task, runtime: Runtime) -> _Outputs:
    right, loss = [], []
    model, field = runtime.place(model), getattr(task, "label", "label")
    with evaluating(model):
        for batch in runtime.batches(records, task):
            logits = task.logits(model, batch)
            right.append((logits.argmax(1) == batch[field]).cpu())
            loss.append(task.loss_of_logits(logits, batch).double().cpu())
    losses = torch.cat(loss)
    return _Outputs(torch.cat(right).numpy(), (-losses).exp().numpy(), losses.numpy())


@dataclass(frozen=True)
class Evaluator:
    """Retraining and methods on several sets of one training set.

    Attributes:
        model: The original.
        records: Its training records.
        test: Test records.
        task: The domain.
        methods: To evaluate beside retraining; a setting that is a list holds candidates, of which the
            best on a random set is used everywhere.
        runtime: Device, and root of the seeds.
        recipe: How to retrain, if the model does not say.
    """

    model: nn.Module
    records: Records
    test: Records
    task: Task
    methods: Sequence[Method] = ()
    runtime: Runtime = field(default_factory=Runtime)
    recipe: TrainingRecipe | None = None

    def check(self, sets: Sequence[str]) -> None:
        """Find bad input before any work.

        Raises:
            MissingNeed: If nobody says how to retrain, or a method lacks something.
            InvalidHyperparameter: If candidates are given and no random set is among the sets.
            UnknownName: For a method or setting that does not exist.
        """
        if self.task.name != "classification":
            raise InvalidHyperparameter(
                f"UA, MIA, RA and TA are measured for classification, not {self.task.name}."
            )
        if self.recipe is None and recipe_of(self.model) is None:
            raise MissingNeed(
                "Evaluation retrains the model: say how it was trained (epochs, learning rate)."
            )
        half = ForgetSplit(self.records.select([0]), self.records.select(np.arange(1, len(self.records))))
        for method in self.methods:
            candidates = settings_grid(method)
            if len(candidates) > 1 and RANDOM not in sets:
                raise InvalidHyperparameter(
                    f"Candidates for '{method.name}' are chosen on random sets: keep the baseline 'random'."
                )
            for settings in candidates:
                built = build_unlearner(method.name, settings)
                require(method.name, built.card.needs, needs_met(self.model, half, built, self.task))

    def rows(
        self,
        sets: Mapping[str, Sequence[Sequence[str]]],
        seeds: int = 1,
        known: Sequence[Mapping[str, Any]] = (),
        keep: Callable[[list[Row]], object] = lambda rows: None,
    ) -> list[Row]:
        """One row per set, method and seed; candidates that were not chosen are among them, and say so.

        Args:
            sets: Ids by name of the set: one list for all seeds, or one per seed.
            seeds: How often everything is repeated, with other seeds of retraining and methods.
            known: Rows of an earlier run; those that fit are not computed again.
            keep: Called with all rows so far after each new one.
        """
        found = {row["key"]: dict(row) for row in known}
        rows: list[Row] = []
        first = dict(sorted(sets.items(), key=lambda item: item[0] != RANDOM))  # candidates are chosen there
        chosen: dict[int, dict[str, Any]] = {}
        total = len(first) * seeds
        for (name, lists), seed in self.runtime.track(
            itertools.product(first.items(), range(seeds)), "worst-case: evaluation", total
        ):
            ids = lists[seed % len(lists)]
            control = self._row(name, ids, seed, Method(name=RETRAIN), {}, None, found)
            rows.append(control)
            keep(rows)
            for number, method in enumerate(self.methods):
                candidates = [chosen[number]] if number in chosen else settings_grid(method)
                tried = [self._row(name, ids, seed, method, item, control, found) for item in candidates]
                best = min(tried, key=lambda row: row["gap"])
                chosen.setdefault(number, best["settings"])
                rows += [{**row, "chosen": row is best} for row in tried]
                keep(rows)
        return rows

    def split(self, ids: Sequence[str]) -> ForgetSplit:
        """A set as a request on the training records."""
        gone = np.isin(np.asarray(self.records.ids, dtype=object), list(ids))
        return ForgetSplit(
            self.records.select(gone), self.records.select(~gone), self.test, description="a set"
        )

    def _row(
        self, name: str, ids: Sequence[str], seed: int, method: Method, settings: dict[str, Any],
        control: Row | None, found: Mapping[str, Row],
    ) -> Row:  # fmt: skip
        recipe = self.recipe or recipe_of(self.model)
        key = content_hash(
            list(ids), seed, self.runtime.seed, method.name, settings, model_fingerprint(self.model),
            recipe.to_dict() if recipe else None, self.test.ids,
        )  # fmt: skip
        about = {
            "set": name,
            "method": method.label or method.name,
            "seed": seed,
            "settings": settings,
            "chosen": True,
        }
        if key in found:
            return {**found[key], **about}
        runtime = replace(
            self.runtime, seed=self.runtime.derive("worst-case evaluation", seed), progress=False
        )
        given: dict[str, Any] = {"recipe": recipe} if method.name == RETRAIN else settings
        split = self.split(ids)
        with runtime.limited():
            after = forget(self.model, split, method.name, self.task, runtime=runtime, **given)
            scores = measure(after, split, self.task, runtime)
        gap = 0.0 if control is None else scores.gap(Scores(**{k: control[k] for k in asdict(scores)}))
        return {**about, **asdict(scores), "gap": gap, "key": key}


def settings_grid(method: Method) -> list[dict[str, Any]]:
    """Every combination of a method's settings in which lists stand for candidates.

    Example:
        >>> settings_grid(Method(name="finetune", settings={"lr": [0.1, 0.01], "epochs": 3}))
        [{'lr': 0.1, 'epochs': 3}, {'lr': 0.01, 'epochs': 3}]
    """
    choices = [value if isinstance(value, list) else [value] for value in method.settings.values()]
    if any(not values for values in choices):
        raise InvalidHyperparameter(f"A list of candidates for '{method.name}' is empty.")
    return [dict(zip(method.settings, values, strict=True)) for values in itertools.product(*choices)]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Mean and spread over the seeds, per set and method, without candidates that were not chosen."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["chosen"]:
            continue
        groups.setdefault((row["set"], row["method"]), []).append(row)
    return [
        {
            "set": name,
            "method": method,
            "settings": mine[0]["settings"],
            "seeds": len(mine),
            **{key: fmean(row[key] for row in mine) for key in (*METRICS, "forget_loss", "gap")},
            **{f"{key}_spread": pstdev([row[key] for row in mine]) for key in (*METRICS, "gap")},
        }
        for (name, method), mine in groups.items()
    ]
