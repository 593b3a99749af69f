"""What forgetting costs: every classifier method against retraining, how it grows, and its memory.

For each method, with its default settings: processor time as a share of retraining's, how that time grows when
the network's width or the number of records doubles and doubles again, and the memory that it takes on top of
model and records. Then Selective Synaptic Dampening with importances kept at training time: how long a request
for a class takes on Fashion-MNIST with the network of examples/fashion_mnist.py.

Run: python benchmarks/methods.py [--quick] [--write] [--root FOLDER] [--only growth|cached]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from speed_page import cpu_seconds, table, write_section
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.models import build_model
from palimpsest.parts.importance import Measure, measure_importance
from palimpsest.parts.importance_file import save_importance
from palimpsest.parts.training import TrainingRecipe
from palimpsest.study.measuring import STATUS, measuring

METHODS = sorted(
    name for name, cls in UNLEARNERS.items() if cls.__module__.startswith("palimpsest.forget.classifier.")
)
SHAPE, CLASSES, WIDTH, RECORDS = (1, 16, 16), 10, 8, 120
SHORT = 0.15
"""Seconds below which a measurement is repeated."""
TASK = pal.tasks.Classification()
RUNTIME = pal.Runtime(seed=0, device="cpu")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Workload:
    """A network and a request to forget one of ten classes.

    Attributes:
        width: Channels of the first convolution of the small CNN; its head's input grows likewise.
        records: Of the training set; others are held out, where a method wants them.
    """

    width: int = WIDTH
    records: int = RECORDS

    @property
    def network(self) -> nn.Module:
        return build_model("small_cnn", SHAPE, CLASSES, seed=0, width=self.width, hidden=8 * self.width)

    @property
    def request(self) -> pal.ForgetSplit:
        random = torch.Generator().manual_seed(0)
        total = self.records + 5 * CLASSES
        labels = torch.arange(total) % CLASSES
        patterns = torch.rand(CLASSES, *SHAPE, generator=random)
        inputs = 0.5 * patterns[labels] + 0.5 * torch.rand(total, *SHAPE, generator=random)
        records = pal.Records(TensorDataset(inputs, labels))
        return pal.split(records, pal.by_column("label", 3), test=0.0, holdout=5 * CLASSES / total)


def settings_of(method: str) -> dict[str, Any]:
    """The defaults, but that nothing stops early, as the time would then depend on the luck of the start."""
    known = {item.name for item in fields(UNLEARNERS.get(method))}  # pyright: ignore[reportArgumentType]
    if method == "retrain":
        return {"recipe": TrainingRecipe()}
    if method == "concept-poisoning":  # patches at random places; concepts would have to be named
        return {"poison": "random", "donor": 9}
    return {"stop_accuracy": None, "clip": 1.0} if "stop_accuracy" in known else {}


def seconds(method: str, workload: Workload) -> float:
    model, request = workload.network, workload.request

    def work() -> None:
        pal.forget(model, request, method, TASK, runtime=RUNTIME, **settings_of(method))

    once = cpu_seconds(work)
    return min(once, cpu_seconds(work, 2)) if once < SHORT else once


def resident_bytes() -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} does not say how much memory is resident.")


def peaks() -> dict[str, float]:
    """Mebibytes at the highest point of a run above those at its start, for every method, on the widest network."""
    workload, found = Workload(width=4 * WIDTH), dict[str, float]()
    model, request = workload.network, workload.request
    small = Workload(width=1, records=4 * CLASSES)
    for method in METHODS:
        settings = settings_of(method)
        pal.forget(small.network, small.request, method, TASK, runtime=RUNTIME, **settings)  # loads its code
        gc.collect()
        before = resident_bytes()
        with measuring(torch.device("cpu")) as measured:
            pal.forget(model, request, method, TASK, runtime=RUNTIME, **settings)
        if measured.peak_bytes is not None:
            found[method] = max(0.0, measured.peak_bytes - before) / MEBIBYTE
    return found


def peaks_in_a_process_that_returns_memory() -> dict[str, float]:
    """`peaks`, where every block of 64 KiB or more goes back to the system at once; nothing if it cannot be told."""
    if not STATUS.exists():
        return {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peaks"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def growth(quick: bool) -> str:
    """The table of all methods."""
    base = Workload()
    larger = [] if quick else [
        Workload(width=2 * WIDTH), Workload(width=4 * WIDTH),
        Workload(records=2 * RECORDS), Workload(records=4 * RECORDS),
    ]  # fmt: skip
    for method in METHODS:  # code is loaded and memory allocated once before anything is measured
        pal.forget(base.network, base.request, method, TASK, runtime=RUNTIME, **settings_of(method))
    memory = peaks_in_a_process_that_returns_memory()
    retraining = seconds("retrain", base)
    rows: list[tuple[float, list[str]]] = []
    for method in METHODS:
        once = retraining if method == "retrain" else seconds(method, base)
        grown = [f"x {seconds(method, workload) / once:.1f}" for workload in larger]
        shown = f"{memory[method]:.1f}" if method in memory else "not known"
        rows.append((once, [method, f"{100 * once / retraining:.1f} %", *grown, shown]))
    columns = [] if quick else ["width x 2", "width x 4", "records x 2", "records x 4"]
    headings = ["method", "share of retraining", *columns, "peak MiB"]
    return table(headings, [row for _, row in sorted(rows)])


def cached(quick: bool, root: str | None) -> str:
    """The table of requests for a class answered from importances kept at training time."""
    records = pal.load_data("fashion-mnist", root=root, limit=6000 if quick else None)
    parts = pal.split(records, pal.by_column("class", "sneaker"), test=0.1, holdout=0.1)
    train, label = parts.train, int(parts.forget.column("label")[0])
    recipe = TrainingRecipe(epochs=1 if quick else 3)
    network = build_model("small_cnn", (1, 28, 28), CLASSES, seed=0)
    found: dict[str, nn.Module] = {}

    def forget(name: str, method: str = "ssd", **settings: Any) -> float:
        def work() -> None:
            found[name] = pal.forget(model, parts, method, TASK, runtime=RUNTIME, **settings)

        once = cpu_seconds(work)
        return min(once, cpu_seconds(work, 3)) if once < SHORT else once

    training = TrainingRecipe(epochs=1)
    model = pal.train(network, train, task=TASK, runtime=RUNTIME, recipe=training)
    retraining = forget("retrained", "retrain", recipe=recipe)
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}

        def keep(name: str, chosen: pal.Records, measure: Measure) -> float:
            def work() -> None:
                importance = measure_importance(model, chosen, TASK, RUNTIME, measure)
                paths[name] = save_importance(Path(folder) / f"{name}.safetensors", importance, measure)

            return cpu_seconds(work)

        whole = keep("full", train, Measure())
        by_class = sum(
            keep(f"class {value}", train.select(train.column("label") == value), Measure(shuffle=False))
            for value in range(CLASSES)
        )
        nothing = forget("nothing")
        full = forget("full", full_importance=paths["full"])
        both = forget("both", full_importance=paths["full"], forget_importance=paths[f"class {label}"])
    for name in ("full", "both"):
        for one, other in zip(found["nothing"].parameters(), found[name].parameters(), strict=True):
            assert torch.equal(one, other), f"{name}: stored importances give another model"
    print(f"a request from stored importances takes less than 1 % of retraining: {both < 0.01 * retraining}")
    shares = {
        f"retraining, {recipe.epochs} epochs on {len(parts.retain or ())} records": retraining,
        "at training time: importances of all records": whole,
        "at training time: importances class by class": by_class,
        "request, nothing stored": nothing,
        "request, importances of all records stored": full,
        "request, importances of the class stored too": both,
    }
    return table(
        ["what", "share of retraining"],
        [[name, f"{100 * value / retraining:.2f} %"] for name, value in shares.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="no growth; a tenth of Fashion-MNIST, one epoch")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results/speed.md")
    parser.add_argument("--root", default=None, help="folder of Fashion-MNIST's files; Debian's by default")
    parser.add_argument("--only", choices=("growth", "cached"), default=None, help="one of the two tables")
    parser.add_argument(
        "--peaks", action="store_true", help="print the peak memory of every method as JSON only"
    )
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.peaks:
        print(json.dumps(peaks()))
        return
    sections = {
        "methods": lambda: growth(settings.quick),
        "cached": lambda: cached(settings.quick, settings.root),
    }
    for name, measure in sections.items():
        if settings.only in (None, {"methods": "growth"}.get(name, name)):
            text = measure()
            print(text, end="\n\n")
            if settings.write:
                write_section(name, text)


if __name__ == "__main__":
    main()
