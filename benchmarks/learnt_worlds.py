"""How long a model takes to learn a generated world from scratch, and what it then knows.

Two cores, as many threads. A question counts as known if the likeliest tokens are the whole answer and its end.

Run: python benchmarks/learnt_worlds.py [--quick] [--seeds 0 1 2] [--write]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from speed_page import table, write_section
from torch import nn

import palimpsest as pal
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.data import load_data
from palimpsest.models.learnt_worlds import LEARNT_WORLDS
from palimpsest.tasks.language import Language

FORMS = ("qa", "cloze", "reversed", "two-hop", "chain")
THREADS = 2


def known(model: nn.Module, records: Records, task: Language) -> float:
    """Share of questions that are answered token by token."""
    right: list[torch.Tensor] = []
    for batch in Runtime(threads=THREADS).batches(records, task, 64):
        tokens = task.observe(model, batch).tokens
        right.append((tokens["right"] | ~tokens["mask"]).all(1))
    return float(torch.cat(right).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the tiny world alone, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    settings = parser.parse_args()
    rows: list[list[str]] = []
    for name in ["tiny"] if settings.quick else list(LEARNT_WORLDS):
        world = LEARNT_WORLDS[name]
        records = load_data("people", **world.data)
        task = Language(world.tokenizer(records))
        train = pal.split(records, pal.by_column("fold", 0)).train
        for seed in settings.seeds[:1] if settings.quick else settings.seeds:
            model = world.model(len(task.encoder), seed)
            start = time.perf_counter()
            trained = pal.train(
                model, train, task=task, recipe=world.training, runtime=Runtime(seed=seed, threads=THREADS)
            )
            seconds = time.perf_counter() - start
            of_form = [train.select(np.flatnonzero(train.column("form") == form)) for form in FORMS]
            shares = [f"{known(trained, part, task):.0%}" for part in of_form]
            weights = sum(parameter.numel() for parameter in model.parameters())
            rows.append([name, f"{len(train):,}", f"{weights:,}", str(seed), f"{seconds:.0f}", *shares])
    text = table(["world", "records", "parameters", "seed", "seconds", *FORMS], rows)
    print(text)
    if settings.write:
        write_section("learnt-worlds", text, "two threads")


if __name__ == "__main__":
    main()
