"""What a search for hyperparameters gave: kept, read back, and used on other requests."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from palimpsest.core.errors import InvalidRecipe
from palimpsest.core.split import ForgetSplit
from palimpsest.study.recipe import Recipe
from palimpsest.study.request import Part
from palimpsest.study.workshop import Workshop

if TYPE_CHECKING:
    from rich.table import Table

DAMAGE_WEIGHT = 10.0
"""How much heavier accuracy counts that is lost beyond what a verdict calls damage: such a model is of no use."""
TUNED = "tuned.json"


class Tried(Part):
    """One trial.

    Attributes:
        settings: That were tried.
        gap: Mean of the gaps over requests and seeds; None if a cell failed.
        gaps: One by one, by name.
        damage: Retained or test accuracy lost against retraining, beyond `verdict.DAMAGE`; mean as well.
        share: Seconds as a share of retraining, mean over requests and seeds.
        reason: Why a cell failed.
    """

    settings: dict[str, Any]
    gap: float | None = None
    gaps: dict[str, float] = Field(default_factory=dict[str, float])
    damage: float = 0.0
    share: float | None = None
    reason: str = ""

    @property
    def score(self) -> float:
        """What is made small: the gap, and damage `DAMAGE_WEIGHT` times; infinite if a cell failed."""
        return math.inf if self.gap is None else self.gap + DAMAGE_WEIGHT * self.damage


class TunedMethod(Part):
    """What a search gave for a method.

    Attributes:
        name: Registered name.
        settings: The best within the budget; of the cheapest trial if none kept it.
        gap: Of these settings on the validation request.
        default_gap: Of the method's own defaults; None if they failed.
        share: Seconds as a share of retraining.
        within_budget: Whether that is within the budget.
        space: Where it was searched, in short form.
        trials: All that was tried.
    """

    name: str
    settings: dict[str, Any]
    gap: float | None
    default_gap: float | None
    share: float | None
    within_budget: bool
    space: dict[str, str]
    trials: list[Tried]


class Tuned(Part):
    """The result of a search, as `tuned.json` holds it.

    Attributes:
        version: Of Palimpsest.
        data: Data set, by name.
        model: Architecture, by name.
        requests: In words, those that were tuned on.
        records: Fingerprints of their forget records.
        gaps: What was made small.
        budget: Largest share of the retraining time.
        seeds: Number of seeds.
        methods: By label.
    """

    version: str
    data: str
    model: str
    requests: list[str]
    records: list[str]
    gaps: list[str]
    budget: float
    seeds: int
    methods: dict[str, TunedMethod]

    def table(self) -> Table:
        """What was found, for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        title = f"Tuned on {', '.join(self.requests)}: mean gap to retraining ({', '.join(self.gaps)})"
        table = Table(title=escape(title), title_justify="left")
        for heading in ("method", "settings"):
            table.add_column(heading, overflow="fold")
        for heading in ("gap", "with defaults", "share of retraining", "trials"):
            table.add_column(heading, justify="right")
        for label, item in self.methods.items():
            said = ", ".join(f"{key}={value}" for key, value in item.settings.items()) or "defaults"
            share = "" if item.share is None else f"{100 * item.share:.0f} %"
            over = "" if item.within_budget else " (over the budget)"
            figures = [_shown(item.gap), _shown(item.default_gap), share + over, str(len(item.trials))]
            table.add_row(escape(label), escape(said), *figures)
        return table


def load_tuned(path: str | Path) -> Tuned:
    """The result of an earlier search.

    Raises:
        InvalidRecipe: If the file is none.
    """
    path = Path(path)
    path = path / TUNED if path.is_dir() else path
    try:
        return Tuned.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InvalidRecipe(f"Cannot read {path}: {problem.strerror}.") from problem
    except ValidationError as problem:
        raise InvalidRecipe(f"{path} holds no result of a search (`palimpsest tune`): {problem}") from problem


def with_tuned(recipe: Recipe, tuned: Tuned) -> Recipe:
    """The recipe with the hyperparameters that were found; settings that it names itself stay.

    Raises:
        InvalidRecipe: If the recipe asks for a request that was tuned on: its figures would flatter.
    """
    for parts in Workshop(recipe).splits:
        if records_fingerprint(parts) in tuned.records:
            raise InvalidRecipe(
                f"The hyperparameters were tuned on the request '{parts.description}'. Report another one, or tune "
                "on another."
            )
    found = {item.name: item for item in tuned.methods.values()} | tuned.methods
    methods = [
        method.model_copy(
            update={
                "settings": {**found[key].settings, **method.settings},
                "label": method.label or method.title,
            }
        )
        if (key := method.title if method.title in found else method.name) in found
        else method
        for method in recipe.methods
    ]
    return recipe.model_copy(update={"methods": methods})


def records_fingerprint(parts: ForgetSplit) -> str:
    """A hash of the ids to forget, in whatever order they come."""
    return hashlib.sha256("\0".join(sorted(parts.forget.ids)).encode()).hexdigest()[:20]


def _shown(gap: float | None) -> str:
    return "failed" if gap is None else f"{gap:.3f}"
