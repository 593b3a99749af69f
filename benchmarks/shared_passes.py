"""Forward passes and seconds of all audits without attacks: shared evidence against audit by audit.

Run: python benchmarks/shared_passes.py [--records 20000] [--controls 3]
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.audit import examine
from palimpsest.core.auditing import AUDITS, Cost
from palimpsest.core.evidence import Evidence
from palimpsest.models import build_model


def evidence_of(
    parts: pal.ForgetSplit, task: pal.tasks.Classification, models: list[torch.nn.Module]
) -> Evidence:
    original, unlearned, *controls = models
    return Evidence(unlearned, parts, task, pal.Runtime(), original, controls, limit=10**9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=6000)
    parser.add_argument("--controls", type=int, default=3)
    settings = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    inputs = torch.rand(settings.records, 1, 28, 28, generator=random)
    labels = torch.randint(0, 10, (settings.records,), generator=random)
    records = pal.Records(TensorDataset(inputs, labels))
    parts = pal.split(records, pal.by_column("label", 3), test=0.2, holdout=0.2)
    task = pal.tasks.Classification()
    models = [
        build_model("small_resnet", (1, 28, 28), 10, seed=seed) for seed in range(settings.controls + 2)
    ]
    names = [name for name, cls in AUDITS.items() if cls.card.cost == Cost.SHARED and cls.card.default]

    start = time.perf_counter()
    shared = evidence_of(parts, task, models)
    examine(shared, names)
    shared_seconds, shared_passes = time.perf_counter() - start, sum(shared.runtime.passes.values())

    start = time.perf_counter()
    naive_passes = 0
    for name in names:
        single = evidence_of(parts, task, models)
        examine(single, [name])
        naive_passes += sum(single.runtime.passes.values())
    naive_seconds = time.perf_counter() - start

    table = Table(
        title=f"{len(names)} audits ({', '.join(names)}), {len(models)} models, {settings.records} records"
    )
    for column in ("", "forward passes (model x part)", "seconds"):
        table.add_column(column)
    table.add_row("shared evidence", str(shared_passes), f"{shared_seconds:.1f}")
    table.add_row("audit by audit", str(naive_passes), f"{naive_seconds:.1f}")
    table.add_row("ratio", f"{naive_passes / shared_passes:.1f}", f"{naive_seconds / shared_seconds:.1f}")
    Console().print(table)
    assert max(shared.runtime.passes.values()) == 1, "a model saw a part twice"


if __name__ == "__main__":
    main()
