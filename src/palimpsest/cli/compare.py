"""`palimpsest compare`: the main job, methods against retraining."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli.loading import import_modules, listed, read_audits, read_seeds
from palimpsest.cli.options import (
    RULE,
    AsJson,
    AuditSet,
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
    from palimpsest.study.result import StudyResult

EXAMPLE = (
    "Examples:\n\n"
    "palimpsest compare --data digits --forget label=3 --methods ssd,scrub --seeds 3 --out runs/first\n\n"
    "palimpsest compare --forget label=3 --forget fraction=0.1 --methods ssd,salun --set methods.0.settings.alpha=30\n\n"
    "palimpsest compare --forget label=3 --forget label=5 --in-turn --methods scrub,ssd\n\n"
    "palimpsest compare --bench people --methods npo,gu+npo,flat --seeds 3\n\n"
    "palimpsest compare recipe.yaml --set forget.fraction=0.05\n\n"
    "palimpsest compare --forget fraction=0.1 --methods ssd --audits utility,shadow-membership "
    "--audit-set shadow-membership.runs=64"
)
ALL_FAILED = 3
SHOWN = 5
"""Most exposed records that are named in the terminal."""


def command(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe of a study; options below change it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME[:PLACE]", help="Data set; digits if none is named.")
    ] = None,
    bench: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A benchmark: fills in data, model, training, request and audits (palimpsest benchmarks).",
        ),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", help=f"{RULE} Repeat the option for several requests."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Methods to compare; retraining is always among them."),
    ] = None,
    seeds: Seeds = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Architecture; small_cnn if none is named.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="classification (if none is named) or regression."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of the training of the original.")] = None,
    audits: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Audits to run; by default all without shadow models."),
    ] = None,
    audit_set: AuditSet = [],  # noqa: B006
    controls: Annotated[
        int | None, typer.Option(help="Retrained models per request that all is judged by.")
    ] = None,
    in_turn: Annotated[
        bool,
        typer.Option(
            "--in-turn",
            help="The requests follow each other: each is put to the model that the answer to the one before left, "
            "and the earlier ones are audited again at the end.",
        ),
    ] = False,
    tuned: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Hyperparameters that `palimpsest tune` found, on another request."
        ),
    ] = None,
    workers: Workers = None,
    store: StoreUrl = None,
    out: RunFolder = None,
    change: Change = None,
    imports: Imports = [],  # noqa: B006
    retry: Retry = False,
    wait: Wait = True,
    page: WritePage = True,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as a Markdown page as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods with retraining from scratch: train, forget, audit, judge.

    What was finished is kept: the same command resumes a study that was interrupted, and one with more
    requests, methods or seeds runs only what is new.
    """
    if recipe is not None and bench is not None:
        raise typer.BadParameter("a recipe and a benchmark exclude each other")
    if recipe is None and bench is None and not forget:
        raise typer.BadParameter("say what to forget (--forget label=3), or name a recipe or a benchmark")
    if recipe is None and not methods:
        raise typer.BadParameter("say which methods to compare (--methods ssd,scrub), or name a recipe")
    named = {
        "name": out.name if out is not None and recipe is None else None,
        "data": data,
        "model": model,
        "task": task,
        "training.epochs": epochs,
        "forget": forget or None,
        "methods": listed(methods) or None,
        "audits": read_audits(audits, audit_set) or None,
        "seeds": read_seeds(seeds) if seeds is not None else None,
        "controls": controls,
        "in_turn": True if in_turn else None,
        "store": store,
        "imports": imports or None,
    }
    import_modules(imports)
    from palimpsest.core.writing import write_text
    from palimpsest.study.compare import compare
    from palimpsest.study.markdown import to_markdown
    from palimpsest.study.recipe import load_recipe
    from palimpsest.study.tuned import load_tuned, with_tuned

    start: Any = recipe or {}
    if bench is not None:
        from palimpsest.suites.benchmark import BENCHMARKS

        chosen = BENCHMARKS.get(bench)
        start = chosen.recipe(model, data)
        named["methods"] = chosen.methods(listed(methods), model)
    said = [
        f"{key}={json.dumps(value)}"
        for key, value in named.items()
        if value is not None and not (bench is not None and key in ("data", "model"))
    ]
    whole = load_recipe(start, [*said, *(change or [])])
    if tuned is not None:
        whole = with_tuned(whole, load_tuned(tuned))
    result = compare(whole, out, workers=workers, progress=True, wait=wait, retry=retry)
    if markdown is not None:
        write_text(markdown, to_markdown(result))
    _present(result, page, as_json)
    if _all_failed(result):
        raise typer.Exit(ALL_FAILED)


def _present(result: StudyResult, page: bool, as_json: bool) -> None:
    """The table, and where everything lies."""
    from palimpsest.study.turns import in_turn, turns_of, turns_table

    written: dict[str, Any] = {"results": result.save(result.folder / "results.json")}
    if page and result.reports:
        from palimpsest.report import write_report

        written["report"] = result.folder / "report.html"
        write_report(result.reports, written["report"], result.name, result.failed)
    if as_json:
        emit(
            {
                "name": result.name,
                "folder": result.folder,
                "cells": len(result.cells),
                "failed": [_failure(cell) for cell in result.failures],
                "summary": [item.to_dict() for item in result.summary()],
                **({"in_turn": [item.to_dict() for item in turns_of(result)]} if in_turn(result) else {}),
                **written,
            }
        )
        return
    show(result.table())
    if in_turn(result):
        show(turns_table(result))
    for line in _exposed(result):
        say(line)
    for failure in result.failed:
        say(f"failed: {failure}")
    for what, place in written.items():
        say(f"{what}: {_near(place)}")


def _exposed(result: StudyResult) -> list[str]:
    """The records that membership attacks with shadow models are surest of, cell by cell."""
    lines: list[str] = []
    for report in result.reports:
        rows = [row for row in report.series.get("exposed", ()) if row["rank"] in range(1, SHOWN + 1)]
        for attack in dict.fromkeys(str(row["attack"]) for row in rows):
            named = ", ".join(str(row["id"]) for row in rows if row["attack"] == attack)
            about = (
                f"{report.facts.get('label')}, {report.facts.get('request')}, seed {report.facts.get('seed')}"
            )
            lines.append(f"most exposed ({attack}; {about}): {named}")
    return lines


def _failure(cell: Any) -> dict[str, Any]:
    return {"label": cell.label, "request": cell.request, "seeds": cell.seeds, "reason": cell.reason}


def _near(path: Path) -> Path:
    """A path as seen from the working folder, if it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _all_failed(result: StudyResult) -> bool:
    """Whether no method that was asked for came to an end (the original and retraining always run)."""
    asked = [cell for cell in result.cells if cell.method not in ("original", "retrain")] or result.cells
    return all(cell.report is None for cell in asked)
