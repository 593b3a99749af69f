"""`palimpsest forget`: one method on the user's own model and data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from palimpsest.cli.loading import (
    Architecture,
    import_modules,
    read_runtime,
    read_settings,
    read_split,
)
from palimpsest.cli.options import (
    Arch,
    ArchSet,
    AsJson,
    Classes,
    Data,
    Device,
    Domain,
    DomainSet,
    Holdout,
    Imports,
    Rule,
    Seed,
    SplitSeed,
    Test,
)
from palimpsest.cli.output import emit, say
from palimpsest.core.errors import CannotWrite, InvalidHyperparameter, MissingNeed

EXAMPLE = (
    "Examples:\n\n"
    "palimpsest forget --model model.safetensors --arch small_cnn --data digits --forget label=3 --method ssd "
    "--set alpha=30 --out forgot.safetensors\n\n"
    "palimpsest forget --model model.safetensors --arch torchvision:resnet18 --data image-folder:photos "
    "--forget ids.json --method retrain --epochs 20 --out retrained.safetensors"
)


def command(
    model: Annotated[Path, typer.Option(help="Weights of the trained model, safetensors.")],
    arch: Arch,
    data: Data,
    forget: Rule,
    method: Annotated[str, typer.Option(help="Name of the method (`palimpsest methods` lists them).")],
    out: Annotated[Path, typer.Option(help="Where to write the new weights, safetensors.")],
    change: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Hyperparameter of the method; repeatable."),
    ] = [],  # noqa: B006
    epochs: Annotated[
        int | None, typer.Option(help="For retrain, if the file does not say how the model was trained.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, with --epochs.")] = None,
    arch_set: ArchSet = [],  # noqa: B006
    classes: Classes = None,
    task: Domain = "classification",
    task_set: DomainSet = [],  # noqa: B006
    test: Test = "0.2",
    holdout: Holdout = "0.2",
    split_seed: SplitSeed = 0,
    seed: Seed = 0,
    device: Device = "auto",
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Make a saved model forget, and save the result beside it.

    The model must have been trained on what remains of the data without test and holdout. The file that
    is read is never overwritten.
    """
    if out.resolve() == model.resolve():
        raise CannotWrite(f"{out} is the model itself, which is never overwritten: choose another --out.")
    import_modules(imports)
    settings = {**read_settings(change), **_training(method, epochs, lr)}
    parts = read_split(data, forget, test, holdout, split_seed)
    network = Architecture(arch, read_settings(arch_set), classes, task, read_settings(task_set))
    before = network.load(model, parts)
    runtime = read_runtime(seed, device, progress=True)
    from palimpsest.core.writing import check_writable
    from palimpsest.forget import forget as apply
    from palimpsest.parts.checkpoint import save_model
    from palimpsest.parts.training import recipe_of

    if method == "retrain" and "recipe" not in settings and recipe_of(before) is None:
        raise MissingNeed(f"{model} does not say how it was trained: say --epochs (and --lr) to retrain.")
    check_writable(out.absolute().parent)
    say(parts.summary())
    start = time.perf_counter()
    after = apply(before, parts, method, network.domain(parts), runtime=runtime, **settings)
    seconds = time.perf_counter() - start
    notes = {"method": method, "settings": json.dumps(settings, default=str), "request": parts.description}
    sha256 = save_model(after, out, {**notes, "seed": str(seed)})
    if as_json:
        sizes = {name: len(part) for name, part in parts.parts.items()}
        emit({**notes, "settings": settings, "seed": seed, "seconds": seconds, "records": sizes,
              "out": out, "sha256": sha256})  # fmt: skip
    else:
        say(f"{method} took {seconds:.1f} s; wrote {out}")


def _training(method: str, epochs: int | None, lr: float | None) -> dict[str, Any]:
    """The recipe of a retraining, from its options."""
    if epochs is None and lr is None:
        return {}
    if method != "retrain":
        raise InvalidHyperparameter(
            f"--epochs and --lr say how to retrain; hyperparameters of '{method}' are given with --set."
        )
    if epochs is None:
        raise InvalidHyperparameter("--lr needs --epochs.")
    from palimpsest.parts.training import TrainingRecipe

    return {"recipe": TrainingRecipe(epochs=epochs) if lr is None else TrainingRecipe(epochs=epochs, lr=lr)}
