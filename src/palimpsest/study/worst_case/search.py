"""Worst-case forget sets: which records (or classes) a method fails to unlearn, by bi-level search.

Upper level: min over w in {w in [0, 1]^N, sum w = m} of sum_i w_i l_i(theta_u(w)) + gamma ||w||^2, where
theta_u(w) is what the lower level, an unlearning method, makes of the original model when w is to be
forgotten. "Challenging Forgets", Fan, Liu, Hero, Liu, ECCV 2024, arXiv 2403.07362.

The step on w takes theta_u(w) for constant in w. For `sign-finetune` and `sign-retrain`, which move by signs
of gradients, that is exact wherever a sign does not flip. For EVERY OTHER method it is an approximation: the
result is then the best set that first-order steps found, no stationary point of the bi-level problem.

Deviations from the published code, each with a setting that brings it back: losses are recorded in
evaluation mode (`record_mode="train"` takes batch norm's batch statistics and dropout instead); a class's
loss is its mean (`class_loss="released"` divides by the count once more); the bisection of the projection is
carried to 1e-10 (`tolerance=1e-5`), so that sum w is m. Default step sizes are for small data, see `Search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import nn

from palimpsest.core.errors import (
    InvalidHyperparameter,
    ModelMismatch,
)
from palimpsest.core.needs import require
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Unlearner, check_range
from palimpsest.forget import build_unlearner, needs_met
from palimpsest.parts.record_weights import check_weights, row_finder
from palimpsest.parts.reinitialise import check_finite
from palimpsest.study.worst_case.items import By, Items, is_integer, set_size
from palimpsest.study.worst_case.lower_level import BY_SIGNS, LowerLevel, Weighted, record_losses
from palimpsest.study.worst_case.record import Progress, WorstCase, search_key, settings_of
from palimpsest.study.worst_case.selection import (
    Goal,
    indicator,
    non_binary_share,
    objective,
    top,
    upper_step,
)


@dataclass(frozen=True)
class Search:
    """How to search.

    Published: alpha 1e-3 and gamma 1e-4 over 20 steps (paper), alpha 0.01 and gamma 0 over 10 (code), on
    45,000 images. From a 0/1 start w moves no further than alpha times the spread of the losses, so alpha
    must be about 1 over that spread or more: with 0.1 on the digits the search does not beat chance, with
    10 it does. `WorstCase` reports how far w moved.

    Attributes:
        goal: "hardest" to forget (the worst case), or "easiest".
        by: "record" (data-wise), or "class" (class-wise: one weight per class, all its records go).
        steps: Upper steps T_up.
        upper_lr: Upper learning rate alpha.
        gamma: Weight of ||w||^2.
        binarise_every: After so many steps w is replaced by its top-m indicator; the set that is returned is
            always that of the last continuous w.
        record_mode: "eval", or "train" as published, in which losses are recorded.
        class_loss: "mean", or "released" (divided by the class's count in the batch once more).
        tolerance: Of the projection; published is 1e-5.
    """

    goal: Goal = "hardest"
    by: By = "record"
    steps: int = 20
    upper_lr: float = 10.0
    gamma: float = 1e-4
    binarise_every: int = 20
    record_mode: Literal["eval", "train"] = "eval"
    class_loss: Literal["mean", "released"] = "mean"
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        choices = {
            "goal": ("hardest", "easiest"),
            "by": ("record", "class"),
            "record_mode": ("eval", "train"),
            "class_loss": ("mean", "released"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidHyperparameter(
                    f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}."
                )
        for name in ("steps", "binarise_every"):
            if not is_integer(getattr(self, name)):
                raise InvalidHyperparameter(f"{name} must be an integer, not {getattr(self, name)!r}.")
            check_range(name, getattr(self, name), 1, float("inf"))
        check_range("upper_lr", self.upper_lr, 0, 1e12, open_low=True)
        check_range("gamma", self.gamma, 0, 1e12)
        check_range("tolerance", self.tolerance, 0, 1, open_low=True)


def worst_case(
    model: nn.Module,
    records: Records,
    task: Task,
    size: int | float | None = None,
    lower: str | Unlearner = "sign-finetune",
    lower_settings: dict[str, Any] | None = None,
    search: Search | None = None,
    start: Sequence[float] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
    **settings: Any,
) -> WorstCase:
    """Search for the records that are hardest (or easiest) to forget.

    Args:
        model: The trained model; not changed.
        records: All its training records (`split.train`).
        task: The domain.
        size: Number m of records (of classes, by class), an integer; or a share of them strictly between 0
            and 1. Needed for records; by class, 10 % of the classes by default, at least one.
        lower: The lower level: a method by name, or an instance. One with `unlearn_weighted` is given w
            itself, any other the top-m set of w.
        lower_settings: Hyperparameters of a method by name.
        search: How to search, instead of `settings`.
        start: Weights to start from, in [0, 1], one per record (class); by default a random m-subset.
        out: File of the result (JSON, usable as `--forget FILE`). The search is kept beside it after every
            upper step, and the same call goes on where it was interrupted; a finished one is read, and
            extended if more steps are asked for.
        seed: Of everything random.
        runtime: Device and progress; by default this machine with `seed`.
        **settings: Fields of `Search`.

    Raises:
        InvalidHyperparameter, UnknownName, MissingNeed: For sizes, weights, settings or methods that cannot
            be used.
        DuplicateIds, InvalidRecords, InvalidLabels, NonFinite, ModelMismatch: For records or a model that
            cannot be used. All before any work.
        InvalidRecipe, CannotWrite: If `out` holds another search, or cannot be written.
        NonFiniteLoss: If unlearning diverges.
    """
    runtime = runtime or Runtime(seed=seed)
    search = search or Search(**settings)
    method = lower if isinstance(lower, Unlearner) else build_unlearner(lower, dict(lower_settings or {}))
    items = Items.of(records, search.by)
    m = set_size(size, items)
    chance = indicator(runtime.numpy("worst-case start").permutation(items.count)[:m], items.count)
    first = chance if start is None else check_weights(start, items.count)
    _check(model, records, task, method, items, first, m, runtime)
    about = {
        "goal": search.goal, "by": search.by, "size": m, "lower": method.card.name,
        "lower_settings": settings_of(method), "weighted": isinstance(method, Weighted),
        "implicit_gradient": "zero" if method.card.name in BY_SIGNS else "ignored",
        "seed": runtime.seed, **{k: v for k, v in asdict(search).items() if k not in ("goal", "by")},
    }  # fmt: skip
    given = None if start is None else first.tolist()
    kept = Progress.open(out, search_key(model, records, method, runtime, about, given), search.steps)
    w, history = kept.state or (first, [])
    quiet = replace(runtime, progress=False)  # two bars at once cannot be drawn
    level = LowerLevel(model, records, task, method, items, m)
    remaining = range(len(history), search.steps)
    with runtime.limited():
        for number in runtime.track(remaining, f"worst-case: {search.goal} {search.by}", len(remaining)):
            of_step = quiet.with_seed(runtime.derive("worst-case lower level", number))
            used = _used(w, number, m, search.binarise_every)
            unlearned = level.unlearn(used, of_step)
            losses = record_losses(unlearned, records, task, of_step, search.record_mode)
            per_item = items.losses(losses, search.class_loss, runtime.batch_size)
            w = upper_step(used, per_item, m, search.upper_lr, search.gamma, search.goal, search.tolerance)
            history = [*history, _step(number + 1, w, per_item, first, m, search.gamma)]
            kept.save(w, history)
    result = WorstCase(
        ids=tuple(np.asarray(records.ids, dtype=object)[items.records_of(top(w, m))].tolist()),
        classes=tuple(items.names[top(w, m)].tolist()) if search.by == "class" else (),
        weights=dict(zip([str(name) for name in items.names], w.tolist(), strict=True)),
        settings=about,
        fingerprint=kept.key,
        history=tuple(history),
        evaluation=() if len(remaining) else kept.evaluation,
    )
    kept.finish(result)
    return result


def _check(
    model: nn.Module,
    records: Records,
    task: Task,
    method: Unlearner,
    items: Items,
    first: Float[np.ndarray, " items"],
    m: int,
    runtime: Runtime,
) -> None:
    """Find bad input before any work."""
    if abs(first.sum() - m) > max(1e-3, 1e-5 * items.count):
        raise InvalidHyperparameter(f"The weights to start from sum to {first.sum():g}, not to size = {m}.")
    if not {"any", task.name} & set(method.card.tasks):
        raise ModelMismatch(
            f"Method '{method.card.name}' works for {', '.join(method.card.tasks)}, not for {task.name}."
        )
    rows = row_finder(records)
    rows(next(iter(runtime.batches(records.select([0, 1]), task, 2))))
    check_finite(model)
    task.check(runtime.place(model), records)
    gone = items.records_of(top(first, m))
    split = ForgetSplit(records.select(gone), records.select(~gone))
    require(method.card.name, method.card.needs, needs_met(model, split, method, task))


def _used(
    w: Float[np.ndarray, " items"], done: int, m: int, binarise_every: int
) -> Float[np.ndarray, " items"]:
    """The weights that the next step starts from: binary after every `binarise_every` steps."""
    return indicator(top(w, m), len(w)) if done and done % binarise_every == 0 else w


def _step(
    number: int,
    w: Float[np.ndarray, " items"],
    losses: Float[np.ndarray, " items"],
    first: Float[np.ndarray, " items"],
    m: int,
    gamma: float,
) -> dict[str, float]:
    """What is told of an upper step."""
    chosen, begun = top(w, m), set(top(first, m).tolist())
    return {
        "step": number,
        "objective": objective(w, losses),
        "penalty": gamma * float(w @ w),
        "set_loss": float(losses[chosen].mean()),
        "mean_loss": float(losses.mean()),
        "non_binary": non_binary_share(w),
        "moved": 1 - len(begun & set(chosen.tolist())) / m,
    }
