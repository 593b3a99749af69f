"""Measurements for the claims of worst-case forget sets.

On every seed of a study the hardest set (and that of a search with too small an upper learning rate) is found
five times over, with other seeds of the search, and as many random sets are drawn; each is retrained without once, with its own seed: `REPEATS` pairs of a set and a
retrained model. The other sets are found and retrained without twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean, pstdev
from typing import Any

from palimpsest.core.errors import MissingNeed
from palimpsest.core.records import Records
from palimpsest.parts.training import recipe_of
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.study.plan import RETRAIN
from palimpsest.study.recipe import Method
from palimpsest.study.worst_case import Chooser, Evaluator, WorstCase, worst_case
from palimpsest.study.worst_case.evaluation import Row
from palimpsest.study.worst_case.record import model_fingerprint

REPEATS, FEW = 5, 2
STEPS, UPPER_LR, SLOW_LR = 6, 10.0, 0.1
"""Upper steps, the upper learning rate, and one with which w hardly moves."""
MEMORISED_STEPS, MEMORISED_LR = 10, 100.0
"""The same for a model that fits all its training records: their losses hardly differ."""
METHODS = (
    Method(name="finetune", settings={"lr": [0.001, 0.01], "epochs": 10, "momentum": 0.9}),
    Method(name="random-label", settings={"lr": [0.0003, 0.001], "epochs": 30}),
)
"""Many epochs of either; learning rates are chosen on the random set."""


@measurement("worst-case-forget-set.ua-hardest")
def ua_hardest(setting: Setting) -> float:
    """UA of retraining without the hardest set."""
    return _mean(setting, "hardest", "ua")


@measurement("worst-case-forget-set.ua-random")
def ua_random(setting: Setting) -> float:
    """UA of retraining without a random set."""
    return _mean(setting, "random", "ua")


@measurement("worst-case-forget-set.hardest-over-random")
def hardest_over_random(setting: Setting) -> float:
    """UA of retraining without the hardest set, over that without a random set."""
    return _ratio(setting, "hardest")


@measurement("worst-case-forget-set.easiest-over-random")
def easiest_over_random(setting: Setting) -> float:
    """The same for the easiest set."""
    return _ratio(setting, "easiest")


@measurement("worst-case-forget-set.lowest-loss-over-random")
def lowest_loss_over_random(setting: Setting) -> float:
    """The same for the m lowest losses of the original model: no search at all."""
    return _ratio(setting, "lowest-loss")


@measurement("worst-case-forget-set.slow-over-random")
def slow_over_random(setting: Setting) -> float:
    """The same for the set of a search with too small an upper learning rate."""
    return _ratio(setting, "slow")


@measurement("worst-case-forget-set.slow-moved")
def slow_moved(setting: Setting) -> float:
    """Share of that set that was not in the random start."""
    return fmean(found.moved for found in _sets(_Keyed.of(setting)).slow)


@measurement("worst-case-forget-set.moved")
def moved(setting: Setting) -> float:
    """Share of the hardest set that was not in the random start."""
    return fmean(found.moved for found in _sets(_Keyed.of(setting)).hardest)


@measurement("worst-case-forget-set.non-binary")
def non_binary(setting: Setting) -> float:
    """Share of weights that are neither 0 nor 1 at the end of the search for the hardest set."""
    return fmean(found.non_binary for found in _sets(_Keyed.of(setting)).hardest)


@measurement("worst-case-forget-set.slow-non-binary")
def slow_non_binary(setting: Setting) -> float:
    """The same with too small an upper learning rate."""
    return fmean(found.non_binary for found in _sets(_Keyed.of(setting)).slow)


@measurement("worst-case-forget-set.loss-hardest")
def loss_hardest(setting: Setting) -> float:
    """Mean loss of the hardest set under the model retrained without it."""
    return _mean(setting, "hardest", "forget_loss")


@measurement("worst-case-forget-set.loss-random-minus-hardest")
def loss_random_minus_hardest(setting: Setting) -> float:
    """Mean loss of a random set minus that of the hardest, each under the model retrained without it."""
    return _mean(setting, "random", "forget_loss") - _mean(setting, "hardest", "forget_loss")


@measurement("worst-case-forget-set.loss-easiest-minus-random")
def loss_easiest_minus_random(setting: Setting) -> float:
    """The same for the easiest set minus a random one."""
    return _mean(setting, "easiest", "forget_loss") - _mean(setting, "random", "forget_loss")


@measurement("worst-case-forget-set.test-hardest-minus-easiest")
def test_hardest_minus_easiest(setting: Setting) -> float:
    """Test accuracy of retraining without the hardest set, minus without the easiest."""
    return _mean(setting, "hardest", "ta") - _mean(setting, "easiest", "ta")


@measurement("worst-case-forget-set.test-hardest-minus-random")
def test_hardest_minus_random(setting: Setting) -> float:
    """Test accuracy of retraining without the hardest set, minus without a random one."""
    return _mean(setting, "hardest", "ta") - _mean(setting, "random", "ta")


@measurement("worst-case-forget-set.ua-spread-hardest")
def ua_spread_hardest(setting: Setting) -> float:
    """Deviation of UA over the hardest sets of several seeds."""
    return _deviation(setting, "hardest")


@measurement("worst-case-forget-set.ua-spread-hardest-minus-random")
def ua_spread_hardest_minus_random(setting: Setting) -> float:
    """The same minus the deviation over random sets."""
    return _deviation(setting, "hardest") - _deviation(setting, "random")


@measurement("worst-case-forget-set.relabelling-gap-growth")
def relabelling_gap_growth(setting: Setting) -> float:
    """Average gap of random labels on the hardest set minus on a random one."""
    return _gap(setting, "random-label", "hardest") - _gap(setting, "random-label", "random")


@measurement("worst-case-forget-set.relabelling-gap-random")
def relabelling_gap_random(setting: Setting) -> float:
    """Average gap of random labels on a random set."""
    return _gap(setting, "random-label", "random")


@measurement("worst-case-forget-set.finetuning-gap-growth")
def finetuning_gap_growth(setting: Setting) -> float:
    """Average gap of fine-tuning on the hardest set minus on a random one."""
    return _gap(setting, "finetune", "hardest") - _gap(setting, "finetune", "random")


@measurement("worst-case-forget-set.finetuning-gap-random")
def finetuning_gap_random(setting: Setting) -> float:
    """Average gap of fine-tuning on a random set."""
    return _gap(setting, "finetune", "random")


@measurement("worst-case-forget-set.membership-random")
def membership_random(setting: Setting) -> float:
    """Share of a random set that the attack on the model retrained without it calls non-members."""
    return _control(_compared(_Keyed.of(setting)), "random", "mia")


@measurement("worst-case-forget-set.membership-hardest-over-random")
def membership_hardest_over_random(setting: Setting) -> float:
    """The same for the hardest set, over that for a random one."""
    chance = membership_random(setting)
    return _control(_compared(_Keyed.of(setting)), "hardest", "mia") / chance if chance else float("nan")


@dataclass(frozen=True)
class _Keyed:
    """A setting, equal to another by what it holds, so that several claims share one computation."""

    key: tuple[str, ...]
    setting: Setting = field(compare=False)

    @classmethod
    def of(cls, setting: Setting) -> _Keyed:
        ids = setting.split.train.ids
        return cls((model_fingerprint(setting.original), str(setting.runtime.seed), *ids), setting)


@dataclass(frozen=True)
class _Sets:
    hardest: tuple[WorstCase, ...]
    easiest: tuple[WorstCase, ...]
    slow: tuple[WorstCase, ...]


@lru_cache(maxsize=16)
def _sets(keyed: _Keyed) -> _Sets:
    return _Sets(
        hardest=_search(keyed.setting, REPEATS),
        easiest=_search(keyed.setting, FEW, goal="easiest"),
        slow=_search(keyed.setting, REPEATS, upper_lr=SLOW_LR),
    )


@lru_cache(maxsize=16)
def _retrained(keyed: _Keyed) -> list[Row]:
    """Retraining without each of the sets."""
    found, chooser, evaluator = _sets(keyed), _chooser(keyed.setting), _evaluator(keyed.setting)
    often: dict[str, Sequence[Sequence[str]]] = {
        "hardest": [item.ids for item in found.hardest],
        "slow": [item.ids for item in found.slow],
        "random": [chooser.ids("random", number) for number in range(REPEATS)],
    }
    twice: dict[str, Sequence[Sequence[str]]] = {
        "easiest": [item.ids for item in found.easiest],
        "lowest-loss": [chooser.ids("lowest-loss")],
    }
    return [*evaluator.rows(often, REPEATS), *evaluator.rows(twice, FEW)]


@lru_cache(maxsize=16)
def _compared(keyed: _Keyed) -> list[Row]:
    """Retraining and methods on the hardest set and a random one."""
    [found] = _search(keyed.setting, 1, steps=MEMORISED_STEPS, upper_lr=MEMORISED_LR)
    sets: dict[str, Sequence[Sequence[str]]] = {
        "random": [_chooser(keyed.setting).ids("random")],
        "hardest": [found.ids],
    }
    return _evaluator(keyed.setting, METHODS).rows(sets)


def _search(setting: Setting, repeats: int, **settings: Any) -> tuple[WorstCase, ...]:
    how: dict[str, Any] = {"steps": STEPS, "upper_lr": UPPER_LR, "gamma": 0.0, **settings}
    return tuple(
        worst_case(
            setting.original, setting.split.train, setting.task, len(setting.split.forget),
            runtime=setting.runtime.with_seed(setting.runtime.derive("search", number)), **how,
        )
        for number in range(repeats)
    )  # fmt: skip


def _chooser(setting: Setting) -> Chooser:
    return Chooser(
        setting.original,
        setting.split.train,
        setting.task,
        len(setting.split.forget),
        runtime=setting.runtime,
    )


def _evaluator(setting: Setting, methods: Sequence[Method] = ()) -> Evaluator:
    return Evaluator(
        setting.original, setting.split.train, _test(setting), setting.task, methods, setting.runtime,
        recipe_of(setting.original),
    )  # fmt: skip


def _test(setting: Setting) -> Records:
    if setting.split.test is None:
        raise MissingNeed("The claim needs test records.")
    return setting.split.test


def _values(setting: Setting, name: str, metric: str) -> list[float]:
    return [row[metric] for row in _retrained(_Keyed.of(setting)) if row["set"] == name]


def _mean(setting: Setting, name: str, metric: str) -> float:
    return fmean(_values(setting, name, metric))


def _deviation(setting: Setting, name: str) -> float:
    return pstdev(_values(setting, name, "ua"))


def _ratio(setting: Setting, name: str) -> float:
    """NaN if retraining makes no error on random sets: then nothing was shown."""
    chance = _mean(setting, "random", "ua")
    return _mean(setting, name, "ua") / chance if chance else float("nan")


def _control(rows: Sequence[Row], name: str, metric: str) -> float:
    return next(row[metric] for row in rows if row["set"] == name and row["method"] == RETRAIN)


def _gap(setting: Setting, method: str, name: str) -> float:
    rows = _compared(_Keyed.of(setting))
    return next(
        row["gap"] for row in rows if row["set"] == name and row["method"] == method and row["chosen"]
    )
