"""`palimpsest worst-case`: the records that are hardest to forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli.loading import (
    Architecture,
    import_modules,
    listed,
    read_runtime,
    read_settings,
    read_split,
)
from palimpsest.cli.options import (
    ArchSet,
    AsJson,
    Classes,
    Data,
    Device,
    Holdout,
    Imports,
    Seed,
    SplitSeed,
    Test,
)
from palimpsest.cli.output import emit, say, show
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, UnknownName, UnreadableCheckpoint

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.core.runtime import Runtime
    from palimpsest.core.split import ForgetSplit
    from palimpsest.parts.training import TrainingRecipe
    from palimpsest.study.recipe import Method
    from palimpsest.study.worst_case import WorstCase

EXAMPLE = (
    "Examples:\n\n"
    "palimpsest worst-case --data digits --size 10% --steps 6 --out worst.json\n\n"
    "palimpsest compare --data digits --forget worst.json --forget fraction=0.1 --methods finetune,random-label "
    "--out runs/worst\n\n"
    "palimpsest worst-case --model model.safetensors --arch small_cnn --data digits --size 100 --methods "
    "finetune,random-label --set random-label.lr=[0.0001,0.001] --seeds 3 --out worst.json\n\n"
    "palimpsest worst-case --data digits --by class --goal easiest --out class.json"
)
ALL = "fraction=0.5"
"""Any rule does: what is searched are the training records of the split, forgotten or not."""


def command(
    data: Data,
    out: Annotated[Path, typer.Option(help="File of the set, JSON; `--forget FILE` takes it.")],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE",
            help="Records (classes) to search for: a number, or a share such as 10% or 0.1; of classes 10% by default.",
        ),
    ] = None,
    by: Annotated[str, typer.Option(metavar="record|class", help="What is chosen.")] = "record",
    goal: Annotated[str, typer.Option(metavar="hardest|easiest", help="To forget.")] = "hardest",
    lower: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="What unlearns within the search: sign-finetune, sign-retrain, or any method (then the search "
            "ignores how the result depends on the choice).",
        ),
    ] = "sign-finetune",
    lower_set: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="Hyperparameter of the lower level; repeatable.")
    ] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Upper steps.")] = 20,
    upper_lr: Annotated[float, typer.Option(help="Upper learning rate.")] = 10.0,
    gamma: Annotated[float, typer.Option(help="Weight of the squared length of the weights.")] = 1e-4,
    binarise_every: Annotated[int, typer.Option(help="Upper steps after which weights become 0 or 1.")] = 20,
    record_mode: Annotated[
        str, typer.Option(metavar="eval|train", help="Mode in which losses are recorded; train as published.")
    ] = "eval",
    model: Annotated[
        Path | None,
        typer.Option(help="Weights of the trained model; without it one is trained and kept beside --out."),
    ] = None,
    arch: Annotated[
        str, typer.Option(metavar="NAME", help="Architecture, as for `palimpsest forget`.")
    ] = "small_cnn",
    epochs: Annotated[
        int | None, typer.Option(help="Of training, and of retraining if the file does not say; 20.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of training, with --epochs.")] = None,
    baselines: Annotated[
        str,
        typer.Option(
            metavar="A,B,...", help="Sets to compare with: random, lowest-loss, el2n, grand, moderate."
        ),
    ] = "random,lowest-loss",
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Methods whose gap to retraining is measured on all sets."),
    ] = None,
    change: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="METHOD.KEY=VALUE",
            help="Hyperparameter of a method; of a list [a,b] the best on a random set is used on all. Repeatable.",
        ),
    ] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="How often retraining and methods are repeated.")] = 1,
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate/--no-evaluate", help="Retrain on the set and the baselines, and measure."),
    ] = True,
    arch_set: ArchSet = [],  # noqa: B006
    classes: Classes = None,
    test: Test = "0.2",
    holdout: Holdout = "0.2",
    split_seed: SplitSeed = 0,
    seed: Seed = 0,
    device: Device = "auto",
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Search for the records that are hardest to forget, and say what retraining and methods make of them.

    A model and a method are judged on random forget sets as a rule; this finds the set on which they do
    worst. It is kept after every step: the same command goes on after an interrupt. Use the same data,
    split, architecture and epochs with `palimpsest compare --forget FILE`.
    """
    if out.suffix != ".json":
        raise InvalidHyperparameter(
            f"--out must end in .json, as --forget reads no other file of ids: {out}."
        )
    import_modules(imports)
    from palimpsest.core.writing import check_writable
    from palimpsest.study.worst_case import Chooser, Evaluator, Search, summary, worst_case
    from palimpsest.study.worst_case.baselines import check_baselines
    from palimpsest.study.worst_case.items import Items, set_size
    from palimpsest.study.worst_case.record import found_at
    from palimpsest.tasks import Classification

    how: dict[str, Any] = {"goal": goal, "by": by, "record_mode": record_mode}
    search = Search(steps=steps, upper_lr=upper_lr, gamma=gamma, binarise_every=binarise_every, **how)
    wanted, compared, judged = _size(size), listed(baselines), _methods(methods, read_settings(change))
    parts = read_split(data, ALL, test, holdout, split_seed)
    number = set_size(wanted, Items.of(parts.train, search.by))
    runtime, task = read_runtime(seed, device, progress=True), Classification()
    said = _recipe(epochs, lr)
    recipe = said or _recipe_in(model)
    check_baselines(compared, search.by, recipe)
    if evaluate and parts.test is None:
        raise MissingNeed("Sets are evaluated on test records: say --test, or --no-evaluate.")
    if evaluate and recipe is None:
        raise MissingNeed(
            f"{model} does not say how it was trained: say --epochs (and --lr), or --no-evaluate."
        )
    network = Architecture(arch, read_settings(arch_set), classes)
    start = network.load(model, parts) if model is not None else network.fresh(parts, seed)
    if evaluate and parts.test is not None:
        probe = Evaluator(start, parts.train, parts.test, task, judged, runtime, recipe)
        probe.check(compared)
    _check_lower(lower, read_settings(lower_set))
    task.check(runtime.place(start), parts.train)
    found_at(out)
    check_writable(out.absolute().parent)
    say(f"training records: {len(parts.train)}, to choose: {number} ({search.by})")
    original = start if model is not None else _trained(start, parts, runtime, recipe, out)
    result = worst_case(
        original, parts.train, task, number, lower, read_settings(lower_set), search, out=out, runtime=runtime
    )
    if evaluate and parts.test is not None:
        chooser = Chooser(original, parts.train, task, number, search.by, runtime, recipe)
        sets: dict[str, Sequence[Sequence[str]]] = {search.goal: [result.ids]}
        sets |= {
            name: [chooser.ids(name, s) for s in range(seeds if name == "random" else 1)] for name in compared
        }
        evaluator = Evaluator(original, parts.train, parts.test, task, judged, runtime, recipe)
        rows = evaluator.rows(sets, seeds, result.evaluation, keep=lambda rows: _with(result, rows).save(out))
        result = _with(result, rows)
    table = summary(result.evaluation)
    if as_json:
        stored = result.to_dict()
        emit({"out": out, **{key: stored[key] for key in stored if key != "scores"}, "summary": table})
        return
    _print(result, table)
    say(f"wrote {out}")


def _with(result: WorstCase, rows: Sequence[Mapping[str, Any]]) -> WorstCase:
    return replace(result, evaluation=tuple(rows))


def _size(text: str | None) -> int | float | None:
    """A number of items, or a share of them."""
    if text is None:
        return None
    try:
        if text.strip().endswith("%"):
            share = float(text.strip()[:-1]) / 100
            if not 0 < share < 1:
                raise InvalidHyperparameter(f"size must be above 0% and below 100%, not {text}.")
            return share
        return int(text) if text.strip().lstrip("+-").isdecimal() else float(text)
    except ValueError as problem:
        raise InvalidHyperparameter(
            f"size must be an integer, or a share such as 10% or 0.1, not '{text}'."
        ) from problem


def _methods(names: str | None, changes: Mapping[str, Any]) -> list[Method]:
    """The methods to evaluate, with their settings."""
    from palimpsest.core.unlearner import UNLEARNERS
    from palimpsest.study.recipe import Method

    known = [name for name in listed(names) if name != "retrain"]
    for name in known:
        UNLEARNERS.get(name)
    settings: dict[str, dict[str, Any]] = {name: {} for name in known}
    for key, value in changes.items():
        name, dot, setting = key.partition(".")
        if not dot:
            raise InvalidHyperparameter(f"A setting is written METHOD.KEY=VALUE, not '{key}={value}'.")
        if name not in settings:
            raise UnknownName("method among --methods", name, settings)
        settings[name][setting] = value
    return [Method(name=name, settings=settings[name]) for name in settings]


def _check_lower(name: str, settings: dict[str, Any]) -> None:
    from palimpsest.forget import build_unlearner

    build_unlearner(name, settings)


def _recipe(epochs: int | None, lr: float | None) -> TrainingRecipe | None:
    """The training that the command line describes, if it does."""
    from palimpsest.parts.training import TrainingRecipe

    if epochs is None:
        if lr is not None:
            raise InvalidHyperparameter("--lr needs --epochs.")
        return None
    return TrainingRecipe(epochs=epochs) if lr is None else TrainingRecipe(epochs=epochs, lr=lr)


def _recipe_in(model: Path | None) -> TrainingRecipe | None:
    """How a model was trained, as its file says; without a file, as `palimpsest compare` trains."""
    from palimpsest.parts.checkpoint import read_checkpoint
    from palimpsest.parts.training import TrainingRecipe

    return TrainingRecipe() if model is None else read_checkpoint(model).recipe


def _trained(
    start: nn.Module, parts: ForgetSplit, runtime: Runtime, recipe: TrainingRecipe | None, out: Path
) -> nn.Module:
    """The model that `palimpsest compare` trains with this seed, kept beside the result.

    Raises:
        UnreadableCheckpoint: If another model lies there.
    """
    from palimpsest.parts.checkpoint import load_model, read_checkpoint, save_model
    from palimpsest.parts.training import TrainingRecipe
    from palimpsest.study.control import train_original
    from palimpsest.study.fingerprint import data_fingerprint
    from palimpsest.study.recipe import content_hash
    from palimpsest.study.worst_case.record import model_fingerprint
    from palimpsest.tasks import Classification

    recipe = recipe or TrainingRecipe()
    alone = replace(runtime, threads=1)  # as a study does: sums depend on the number of threads
    key = content_hash(
        model_fingerprint(start), data_fingerprint(parts.train), recipe.to_dict(), runtime.seed,
        runtime.torch_device.type,
    )  # fmt: skip
    path = out.with_suffix(".safetensors")
    if path.exists():
        if read_checkpoint(path).notes.get("worst-case") != key:
            raise UnreadableCheckpoint(
                f"{path} holds another model than the one to train. Say --model {path} to use it, or choose another --out."
            )
        return runtime.place(load_model(path, start))
    with alone.limited():
        model = train_original(start, parts, Classification(), alone, recipe)
    save_model(model, path, {"worst-case": key})
    say(f"trained the original: {path}")
    return model


def _print(result: WorstCase, table: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    chosen = f" (classes {', '.join(map(str, result.classes))})" if result.classes else ""
    show(
        Text(f"{len(result.ids)} records{chosen}, {result.settings['goal']} to forget"),
        Text(
            f"objective {result.objective:.4g} after {len(result.history)} steps; {result.non_binary:.1%} of the "
            f"weights are neither 0 nor 1; {result.moved:.0%} of the set were not in the random start"
        ),
    )
    for problem in (result.warning, result.caution):
        if problem:
            show(Text(problem, "yellow"))
    if not table:
        return
    grid = Table(title="shares; gap: mean over UA, MIA, RA, TA of |method - retrain|", title_justify="left")
    for heading in ("set", "method", "UA", "MIA", "RA", "TA", "forget loss", "gap"):
        grid.add_column(heading, justify="left" if heading in ("set", "method") else "right")
    for row in table:
        numbers = [_spread(row, key) for key in ("ua", "mia", "ra", "ta")]
        name = ", ".join([row["method"], *(f"{key}={value}" for key, value in row["settings"].items())])
        gap = "" if row["method"] == "retrain" else _spread(row, "gap")
        grid.add_row(*(Text(cell) for cell in (row["set"], name, *numbers, f"{row['forget_loss']:.3f}", gap)))
    show(grid)


def _spread(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.3f}" + (f" ± {row[f'{key}_spread']:.3f}" if row["seeds"] > 1 else "")
