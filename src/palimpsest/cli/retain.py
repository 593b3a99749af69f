"""`palimpsest retain`: learners over streams, and what they retain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli.loading import import_modules, listed, read_classes, read_seeds
from palimpsest.cli.options import (
    AsJson,
    Change,
    Imports,
    Retry,
    RunFolder,
    Seeds,
    StoreUrl,
    Wait,
    Workers,
    WritePage,
)
from palimpsest.cli.output import emit, say, show

if TYPE_CHECKING:
    from palimpsest.study.retain.result import RetainResult

EXAMPLE = (
    "Examples:\n\n"
    "palimpsest retain --data digits --stream class:5x2 --methods er,der++ --seeds 3 --out runs/digits\n\n"
    "palimpsest retain --stream class:5x2 --stream task:5x2 --methods finetune,er,joint --epochs 10 --every 5\n\n"
    "palimpsest retain --stream domain:permuted:5:online --methods er --set methods.0.settings.memory=500\n\n"
    "palimpsest retain --stream class:3x2 --pretrain 4 --model small_vit --methods finetune,rehearsal-free\n\n"
    "palimpsest retain recipe.yaml --set training.lr=0.05"
)
ALL_FAILED = 3


def command(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe of a study; options below change it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME[:PLACE]", help="Data set; digits if none is named.")
    ] = None,
    stream: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORM",
            help="class:5x2, task:5x2, domain:permuted:5, domain:rotated:0,30, blurry:5x2@0.1, "
            "power-law:permuted:6@0.25; with :online every record is seen once. Repeat for several.",
        ),
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B,...", help="Learners to compare.")] = None,
    seeds: Seeds = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Architecture; mlp if none is named.")
    ] = None,
    pretrain: Annotated[
        str | None,
        typer.Option(
            metavar="N|A,B,...",
            help="Train the network on so many classes (or these) first; the stream has the others. "
            "More with --set pretraining.epochs=20.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over each experience.")] = None,
    every: Annotated[
        int | None, typer.Option(min=0, help="Steps between evaluations while learning; 0 makes none.")
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Note the norms of plasticity and stability at every step.")
    ] = False,
    workers: Workers = None,
    store: StoreUrl = None,
    out: RunFolder = None,
    change: Change = None,
    imports: Imports = [],  # noqa: B006
    retry: Retry = False,
    wait: Wait = True,
    page: WritePage = True,
    as_json: AsJson = False,
) -> None:
    """Learn streams of tasks, and measure what is retained, at the end and while learning.

    The same command resumes a study that was interrupted, in the middle of a stream too: after the last
    experience that was finished, to the same result.
    """
    if recipe is None and not stream:
        raise typer.BadParameter("say what to learn (--stream class:5x2), or name a recipe")
    if recipe is None and not methods:
        raise typer.BadParameter("say which methods to compare (--methods er,der++), or name a recipe")
    named = {
        "name": out.name if out is not None and recipe is None else None,
        "data": data,
        "streams": stream or None,
        "methods": listed(methods) or None,
        "seeds": read_seeds(seeds) if seeds is not None else None,
        "model": model,
        "pretraining.classes": read_classes(pretrain) if pretrain is not None else None,
        "training.epochs": epochs,
        "every": every,
        "gradients": gradients or None,
        "store": store,
        "imports": imports or None,
    }
    import_modules(imports)
    from palimpsest.study.retain import load_retain_recipe, retain

    said = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    whole = load_retain_recipe(recipe or {}, [*said, *(change or [])])
    result = retain(whole, out, workers=workers, progress=True, wait=wait, retry=retry)
    _present(result, page, as_json)
    if not result.done:
        raise typer.Exit(ALL_FAILED)


def _present(result: RetainResult, page: bool, as_json: bool) -> None:
    """The table, and where everything lies."""
    written: dict[str, Any] = {"results": result.save(result.folder / "results.json")}
    if page and result.done:
        from palimpsest.report.retaining import write_retain_report

        written["report"] = write_retain_report(result, result.folder / "report.html")
    if as_json:
        emit({
            "name": result.name,
            "folder": result.folder,
            "cells": len(result.cells),
            "failed": result.failed,
            "summary": [row.to_dict() for row in result.summary()],
            **written,
        })  # fmt: skip
        return
    show(result.table())
    for failure in result.failed:
        say(f"failed: {failure}")
    for what, place in written.items():
        say(f"{what}: {place}")
