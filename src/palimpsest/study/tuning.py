"""Tuning: hyperparameters from a small search on a validation request, never on the one that is reported."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import track
from sqlalchemy import URL

import palimpsest
from palimpsest.audit.verdict import DAMAGE
from palimpsest.core.errors import InvalidRecipe, MissingDependency, UnknownName
from palimpsest.core.search_space import Choice, Searchable
from palimpsest.core.unlearner import UNLEARNERS, check_settings
from palimpsest.core.writing import check_writable, write_text
from palimpsest.study.compare import compare
from palimpsest.study.executors import Executor, LocalExecutor
from palimpsest.study.folder import ARTIFACTS, DATABASE
from palimpsest.study.headline import UTILITY, audits_of_figures, figure
from palimpsest.study.headline import gap as gap_to_controls
from palimpsest.study.plan import RETRAIN
from palimpsest.study.recipe import Method, Recipe, content_hash, load_recipe
from palimpsest.study.result import CellResult
from palimpsest.study.tuned import TUNED, Tried, Tuned, TunedMethod, records_fingerprint
from palimpsest.study.workshop import Workshop

if TYPE_CHECKING:
    from optuna import Study, Trial


def tune(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    trials: int = 12,
    gaps: Sequence[str] | None = None,
    budget: float = 1.0,
    search: Mapping[str, Mapping[str, Searchable]] | None = None,
    seed: int = 0,
    overrides: Iterable[str] = (),
    workers: int | None = None,
    progress: bool = True,
    executor: Executor | None = None,
    first: Mapping[str, Mapping[str, Any]] | None = None,
) -> Tuned:
    """Search each method's hyperparameters on the requests of a recipe, by Optuna's tree-structured Parzen estimator.

    Trials are cells of studies that share one store: an interrupted search goes on where it stood, and the
    same seed gives the same trials. What is made small is the mean gap, and accuracy on retained or test records
    that is lost beyond what counts as damage, many times over (`Tried.score`). The first trial of a method is
    its defaults, so that what is found is never worse than they are on the validation request. What a trial costs is not searched on, because clocks
    differ: among all trials the best within the budget is taken.

    Args:
        recipe: Data, model, training, seeds, the validation requests and the methods; settings given there
            stay as they are.
        out: Folder of the search; "tuned.json" is written there.
        trials: Per method that has something to search.
        gaps: Names of `headline.FIGURES` whose distances to the controls are averaged; by default all that the
            task has.
        budget: Largest share of the retraining time.
        search: Spaces by method and hyperparameter, instead of those that the methods declare.
        seed: Of the search.
        overrides: "key=value" changes of the recipe.
        workers: Processes, instead of the recipe's.
        progress: Whether to draw a progress bar.
        executor: Where cells run; the caller closes it.
        first: Settings of a method's first trial by its title, where they are not its defaults.

    Raises:
        UnknownName: For an unknown gap, method or hyperparameter.
        InvalidRecipe: If numbers make no sense. All before any work.
        MissingDependency: If Optuna is not installed.
    """
    recipe = load_recipe(recipe.plain() if isinstance(recipe, Recipe) else recipe, overrides)
    measurers = audits_of_figures(recipe.task.name)
    gaps = list(measurers) if gaps is None else gaps
    for gap in gaps:
        if gap not in measurers:
            raise UnknownName(f"gap of {recipe.task.name}", gap, measurers)
    if trials < 1 or not budget > 0 or not gaps:
        raise InvalidRecipe(
            f"A search needs at least one trial and one gap, and a budget above 0: {trials}, {budget}."
        )
    if recipe.in_turn:
        raise InvalidRecipe("Tune on requests that stand apart (in_turn: false).")
    spaces = _spaces(recipe, search or {})
    folder = check_writable(Path(out))
    told = {item.name: item.model_dump(mode="json") for item in recipe.audits or []}
    audits = [
        told.get(name, {"name": name, "settings": {}})
        for name in dict.fromkeys(measurers[gap] for gap in gaps)
    ]
    plain = {
        **recipe.plain(), "audits": audits, "keep_models": False,
        "store": URL.create("sqlite", database=str((folder / DATABASE).absolute())).render_as_string(),
        "artifacts": recipe.artifacts or str((folder / ARTIFACTS).absolute()),
    }  # fmt: skip
    searches = {
        title: _Search(method, spaces[title], seed, (first or {}).get(title, {}))
        for title, method in _titled(recipe).items()
    }
    with ExitStack() as stack:
        if executor is None:
            executor = LocalExecutor(recipe.workers if workers is None else workers)
            stack.callback(executor.close)
        rounds = range(trials if any(spaces.values()) else 1)
        console = Console(stderr=True, quiet=not progress)
        for number in track(rounds, "tuning", console=console, transient=True):
            asked = {title: item.ask() for title, item in searches.items() if number == 0 or spaces[title]}
            unique = {content_hash(m.name, m.settings): m.model_dump() for m in asked.values()}
            place = folder / "rounds" / content_hash(plain, sorted(unique))
            result = compare(
                {**plain, "methods": list(unique.values())}, place, progress=False, executor=executor
            )
            for title, method in asked.items():
                cells = [cell for cell in result.cells if cell.label == method.title]
                searches[title].tell(_tried(method, cells, gaps))
    splits = Workshop(recipe).splits
    tuned = Tuned(
        version=palimpsest.__version__,
        data=recipe.data.name,
        model=recipe.model.name,
        requests=[parts.description for parts in splits],
        records=[records_fingerprint(parts) for parts in splits],
        gaps=list(gaps),
        budget=budget,
        seeds=len(recipe.seeds),
        methods={title: item.found(budget) for title, item in searches.items()},
    )
    write_text(folder / TUNED, tuned.model_dump_json(indent=1) + "\n")
    return tuned


class _Search:
    """The trials of one method."""

    def __init__(self, method: Method, space: Mapping[str, Searchable], seed: int, first: Mapping[str, Any]):
        self.method, self.space, self.first = method, space, first
        self.tried: list[Tried] = []
        self.study = _optuna_study(seed)
        self.trial: Trial | None = None
        own = _defaults(method.name, space, first)
        self.defaults_fit = own is not None
        if own is not None:
            self.study.enqueue_trial(own)

    def ask(self) -> Method:
        """The method with the next settings to try; first its defaults."""
        first = not self.tried
        if first and not self.defaults_fit:
            self.trial = None
            return self._with(self.first)
        self.trial = self.study.ask()
        chosen = {key: _suggest(self.trial, key, space) for key, space in self.space.items()}
        return self._with(self.first if first else chosen)

    def _with(self, settings: Mapping[str, Any]) -> Method:
        label = f"{self.method.title} #{content_hash(dict(settings))[:6]}"
        return self.method.model_copy(
            update={"settings": {**self.method.settings, **settings}, "label": label}
        )

    def tell(self, tried: Tried) -> None:
        """Note what came of the settings that were asked for last."""
        self.tried.append(tried)
        if self.trial is not None:
            from optuna.trial import TrialState

            if tried.gap is None:
                self.study.tell(self.trial, state=TrialState.FAIL)
            else:
                self.study.tell(self.trial, tried.score)

    def found(self, budget: float) -> TunedMethod:
        """The best trial within the budget, else the cheapest."""
        done = [item for item in self.tried if item.gap is not None]
        within = [item for item in done if item.share is None or item.share <= budget]
        if within:
            best = min(within, key=lambda item: item.score)
        else:
            best = min(done or self.tried, key=lambda item: item.share or math.inf)
        return TunedMethod(
            name=self.method.name, settings=best.settings, gap=best.gap, default_gap=self.tried[0].gap,
            share=best.share, within_budget=bool(within), trials=self.tried,
            space={key: str(space) for key, space in self.space.items()},
        )  # fmt: skip


def _spaces(recipe: Recipe, own: Mapping[str, Mapping[str, Searchable]]) -> dict[str, dict[str, Searchable]]:
    """What to search per method, by title.

    Raises:
        UnknownName: For a method that is not in the recipe, or a hyperparameter that it has not.
    """
    titled = _titled(recipe)
    for name, spaces in own.items():
        if name not in titled:
            raise UnknownName("method to tune", name, titled)
        check_settings("method", UNLEARNERS.get(titled[name].name), titled[name].name, spaces)
    found: dict[str, dict[str, Searchable]] = {}
    for title, method in titled.items():
        spaces = own.get(title) or UNLEARNERS.get(method.name).card.search
        found[title] = {key: space for key, space in spaces.items() if key not in method.settings}
    return found


def _titled(recipe: Recipe) -> dict[str, Method]:
    return {method.title: method for method in recipe.methods if method.name != RETRAIN}


def _tried(method: Method, cells: Sequence[CellResult], gaps: Sequence[str]) -> Tried:
    """What came of a method's cells."""
    reasons = [cell.reason for cell in cells if cell.report is None]
    if reasons:
        return Tried(settings=dict(method.settings), reason=reasons[0])
    each = {
        gap: [found for cell in cells if (found := gap_to_controls(cell, gap)) is not None] for gap in gaps
    }
    means = {gap: sum(values) / len(values) for gap, values in each.items() if values}
    if not means:
        raise InvalidRecipe(f"None of the gaps {', '.join(gaps)} can be measured on these requests.")
    shares = [cell.share for cell in cells if cell.share is not None]
    return Tried(
        settings=dict(method.settings),
        gap=sum(means.values()) / len(means),
        gaps=means,
        damage=sum(_damage(cell) for cell in cells) / len(cells),
        share=sum(shares) / len(shares) if shares else None,
    )


def _damage(cell: CellResult) -> float:
    """Accuracy lost on retained or test records against the controls, beyond what a verdict bears."""
    found = [figure(cell, part) for part in UTILITY]
    lost = [
        item.control - item.value
        for item in found
        if item is not None and item.value is not None and item.control is not None
    ]
    return max(0.0, max(lost, default=0.0) - DAMAGE)


def _optuna_study(seed: int) -> Study:
    try:
        import optuna
    except ImportError as missing:
        raise MissingDependency("optuna", "tune") from missing
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True)
    return optuna.create_study(sampler=sampler)


def _suggest(trial: Trial, key: str, space: Searchable) -> Any:
    """The next value, numbers to four digits so that they can be read."""
    if isinstance(space, Choice):
        return trial.suggest_categorical(key, list(space.values))
    if space.integer:
        return trial.suggest_int(key, int(space.low), int(space.high), log=space.log)
    return float(f"{trial.suggest_float(key, space.low, space.high, log=space.log):.4g}")


def _defaults(name: str, space: Mapping[str, Searchable], first: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of the first trial of what is searched, if they all lie in the space."""
    own = {item.name: item.default for item in fields(cast(Any, UNLEARNERS.get(name)))} | dict(first)
    for key, searched in space.items():
        value = own[key]
        if isinstance(searched, Choice):
            inside = value in searched.values
        else:
            inside = isinstance(value, int | float) and searched.low <= value <= searched.high
        if not inside:
            return None
    return {key: own[key] for key in space}
