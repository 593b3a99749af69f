"""What learning a stream costs: steps, continual evaluation, buffers, and how they grow with tasks and classes.

Inputs have the shapes of scikit-learn's digits (1 x 8 x 8) and of Fashion-MNIST (1 x 28 x 28) and are generated:
neither time nor memory depends on what they show. Times are processor seconds of `observe`, with the evaluations
that are made in it and without those after an experience.

Run: python benchmarks/retain.py [--quick] [--write]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from speed_page import table, write_section
from torch import Tensor
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.models import build_model
from palimpsest.retain import Run, Stream, Training, build_learner, parse_stream
from palimpsest.retain.buffers import ClassBalanced, Herding, Reservoir, Ring

SHAPES = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28)}
METHODS = ("finetune", "er", "der++", "pcr")
PER_CLASS, MEMORY, BATCH = 100, 200, 16
TASKS, CLASSES = (5, 10, 20), (10, 20, 50)
EVALUATIONS = ((1, None), (1, 10), (5, None), (5, 10), (25, 10))
"""Steps between evaluations, and test records of each task at most."""


def stream_of(form: str, shape: tuple[int, ...], classes: int) -> Stream:
    """Records that are a pattern of their class and noise."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(PER_CLASS * classes) % classes
    patterns = torch.rand(classes, *shape, generator=random)
    inputs = 0.5 * patterns[labels] + 0.5 * torch.rand(len(labels), *shape, generator=random)
    return parse_stream(form, pal.Records(TensorDataset(inputs, labels)))


def learned(
    method: str, stream: Stream, every: int = 0, subset: int | None = None, repeats: int = 1
) -> tuple[float, int]:
    """Least processor seconds of a step over some runs, and the bytes that the learner keeps at the end."""
    best, kept = float("inf"), 0
    settings: dict[str, Any] = {} if method == "finetune" else {"memory": MEMORY}
    shape = tuple(stream[0].records[0]["input"].shape)
    for _ in range(repeats):
        model = build_model("mlp", shape, stream.classes, seed=0, width=100)
        runtime, training = pal.Runtime(seed=0, device="cpu"), Training(lr=0.05, batch_size=BATCH)
        learner = build_learner(method, settings)
        run = Run(learner, stream, model, training=training, runtime=runtime, every=every, subset=subset)
        taken, observe = [0.0], learner.observe

        def timed(
            experience: Any, observe: Callable[[Any], None] = observe, taken: list[float] = taken
        ) -> None:
            start = time.process_time()
            observe(experience)
            taken[0] += time.process_time() - start

        learner.observe = timed  # pyright: ignore[reportAttributeAccessIssue]
        while not run.finished:
            run.advance()
        best, kept = min(best, taken[0] / learner.student.steps), run.kept[-1]
    return best, kept


def speeds(repeats: int) -> str:
    """Steps per second of every method, as a ratio to finetune's."""
    rows: list[list[str]] = []
    for name, shape in SHAPES.items():
        stream = stream_of("class:5x2:online", shape, 10)
        learned("finetune", stream)  # code is loaded before anything is measured
        base = 0.0
        for method in METHODS:
            step, _ = learned(method, stream, repeats=repeats)
            base = base or step
            rows.append([name, method, f"{1 / step:.0f}", f"{step / base:.2f}"])
    return table(["shape", "method", "steps per second", "time of a step / finetune's"], rows)


def evaluation(repeats: int) -> str:
    """Continual evaluation as a share of the time, for ER."""
    rows: list[list[str]] = []
    for name, shape in SHAPES.items():
        stream = stream_of("class:5x2:online", shape, 10)
        plain, _ = learned("er", stream, repeats=repeats)
        for every, subset in EVALUATIONS:
            step, _ = learned("er", stream, every, subset, repeats)
            tested = "all" if subset is None else str(subset)
            rows.append([name, str(every), tested, f"{round(100 * (1 - plain / step))} %"])
    return table(["shape", "every steps", "test records of a task", "share of the time"], rows)


def buffers() -> str:
    """Bytes of every buffer of the same size, with labels alone and with what methods store beside them."""
    rows: list[list[str]] = []
    random = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        inputs, labels = torch.rand(1000, *shape, generator=random), torch.arange(1000) % 10
        stored: dict[str, dict[str, Tensor]] = {
            "labels": {},
            "labels, 10 logits": {"logits": torch.rand(1000, 10)},
            "labels, 100 activations": {"activations": torch.rand(1000, 100)},
        }
        for what, more in stored.items():
            fields = {"input": inputs, "label": labels, **more}
            reservoir, ring = Reservoir(MEMORY, random), Ring(MEMORY, 10, random)
            balanced, herding = ClassBalanced(MEMORY, random), Herding(MEMORY, random)
            for buffer in (reservoir, ring, balanced):
                buffer.add(**fields)
            herding.add(inputs.flatten(1), **fields)
            held = [buffer.bytes for buffer in (reservoir, ring, balanced, herding)]
            rows.append([name, what, *(f"{size:,}" for size in held)])
    return table(["shape", "inputs and", "reservoir", "ring", "balanced", "herding"], rows)


def growth(repeats: int, quick: bool) -> str:
    """Time of a step and bytes kept, with more tasks and with more classes."""
    tasks, classes = (TASKS[:1], CLASSES[:1]) if quick else (TASKS, CLASSES)
    forms = [(f"{number} tasks", f"domain:permuted:{number}:online", 10) for number in tasks]
    forms += [(f"{number} classes", f"class:5x{number // 5}:online", number) for number in classes]
    streams = {label: stream_of(form, SHAPES["digits"], number) for label, form, number in forms}
    rows: list[list[str]] = []
    for method in METHODS:
        base = 0.0
        for label, stream in streams.items():
            step, kept = learned(method, stream, repeats=repeats)
            base = step if label.startswith((f"{tasks[0]} t", f"{classes[0]} c")) else base
            audited, _ = learned(method, stream, 5, 10, repeats)
            share = f"{round(100 * (1 - step / audited))} %"
            rows.append([method, label, f"x {step / base:.2f}", share, f"{kept:,}"])
    headings = ["method", "stream", "time of a step", "evaluation every 5 steps, 10 records", "bytes kept"]
    return table(headings, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one repeat, the smallest streams of the growth")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results/speed.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 1 if settings.quick else 2
    parts = [speeds(repeats), evaluation(repeats), buffers(), growth(repeats, settings.quick)]
    text = "\n\n".join(parts)
    print(text)
    if settings.write:
        write_section("retain", text)


if __name__ == "__main__":
    main()
