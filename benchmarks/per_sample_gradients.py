"""Per-sample gradients: chunks vectorised by torch.func against a loop over single records.

Three uses: importances (SSD with a per-sample Fisher), influence vectors (products of every record's gradient
with a direction, in the WoodFisher recursion), and diagonals of the Fisher information (Fisher noise). Both
ways give the same numbers, which is checked. Ratios above 1 say how many times faster the library's way is.

Run: python benchmarks/per_sample_gradients.py [--quick] [--write]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from speed_page import cpu_seconds, table, write_section
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.forget.classifier.fisher_noise import per_sample_fisher
from palimpsest.forget.classifier.influence import woodfisher
from palimpsest.models import build_model
from palimpsest.parts.importance import squared_gradients

Named = dict[str, Tensor]
SHAPE, CLASSES = (1, 16, 16), 10
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 64},
    "small_cnn": {"width": 8},
    "small_resnet": {"width": 8},
}
TASK = pal.tasks.Classification()


def gradients_one_by_one(model: nn.Module, batch: dict[str, Any]) -> Iterator[Named]:
    """Gradient of every record's loss, by plain backward passes."""
    model.eval()
    for x, y in zip(batch["input"], batch["label"], strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        found = torch.autograd.grad(loss, list(model.parameters()))
        yield dict(zip(dict(model.named_parameters()), found, strict=True))


def importance_loop(model: nn.Module, batch: dict[str, Any]) -> Named:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for gradient in gradients_one_by_one(model, batch):
        for name, value in gradient.items():
            total[name] += value.detach() ** 2
    return {name: value / len(batch["id"]) for name, value in total.items()}


def influence_loop(model: nn.Module, batch: dict[str, Any], v: Named, samples: int) -> Named:
    """The published recursion over flattened vectors, record by record."""
    flat = torch.cat([value.flatten() for value in v.values()])
    k, o = flat.clone(), torch.empty(0)
    for gradient in gradients_one_by_one(model, batch):
        g = torch.cat([value.flatten() for value in gradient.values()]).detach()
        if not len(o):
            o = g.clone()
            continue
        t = o @ g
        k = k - (k @ g) / (samples + t) * o
        o = o - t / (samples + t) * o
    pieces = k.split([value.numel() for value in v.values()])
    return {name: piece.view_as(v[name]) for name, piece in zip(v, pieces, strict=True)}


def fisher_loop(model: nn.Module, batch: dict[str, Any]) -> Named:
    """Expectation over the model's answers, class by class and record by record."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    model.eval()
    for x in batch["input"]:
        log_p = model(x[None])[0].log_softmax(0)
        for label in range(CLASSES):
            found = torch.autograd.grad(log_p[label], parameters, retain_graph=True)
            for name, value in zip(total, found, strict=True):
                total[name] += log_p[label].detach().exp() * value**2
    return {name: value / len(batch["id"]) for name, value in total.items()}


def largest_difference(one: Named, other: Named) -> float:
    """Relative to the largest value of each tensor."""
    gaps = [float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-30)) for n in other]
    return max(gaps)


def in_chunks(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    return [
        {key: value[start : start + size] for key, value in batch.items()}
        for start in range(0, len(batch["id"]), size)
    ]


def ways(
    model: nn.Module, batch: dict[str, Any], chunk: int
) -> dict[str, tuple[Callable[[], Named], Callable[[], Named]]]:
    """For every use: the library's way and the loop."""
    generator = torch.Generator().manual_seed(1)
    v = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    n, chunks = len(batch["id"]), in_chunks(batch, chunk)
    return {
        "importances": (
            partial(squared_gradients, model, chunks, TASK, "per-sample", chunk),
            partial(importance_loop, copy.deepcopy(model), batch),
        ),
        "influence vectors": (
            partial(woodfisher, model, chunks, TASK, v, n),
            partial(influence_loop, copy.deepcopy(model), batch, v, n),
        ),
        "Fisher diagonals": (
            partial(per_sample_fisher, model, chunks, TASK, "expected"),
            partial(fisher_loop, copy.deepcopy(model), batch),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one network, one size of chunks, 32 records")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    networks = ["small_cnn"] if settings.quick else list(NETWORKS)
    sizes, count, repeats = ([32], 32, 1) if settings.quick else ([8, 32], 64, 2)
    random = torch.Generator().manual_seed(0)
    inputs, labels = torch.rand(count, *SHAPE, generator=random), torch.arange(count) % CLASSES
    batch = pal.Records(TensorDataset(inputs, labels)).batch(range(count), TASK.collate)
    rows: list[list[str]] = []
    for network in networks:
        model = build_model(network, SHAPE, CLASSES, seed=0, **NETWORKS[network])
        weights = sum(p.numel() for p in model.parameters())
        found: dict[str, list[str]] = {}
        for size in sizes:
            for use, (ours, loop) in ways(model, batch, size).items():
                gap = largest_difference(ours(), loop())  # also warms both up
                assert gap < 1e-2, f"{network}, {use}: the two ways differ by {gap:.1e}"
                fast, slow = cpu_seconds(ours, repeats), cpu_seconds(loop, repeats)
                found.setdefault(use, []).append(f"{slow / fast:.1f}")
        rows += [[network, f"{weights:,}", use, *ratios] for use, ratios in found.items()]
    text = table(["network", "weights", "use", *(f"chunks of {size}" for size in sizes)], rows)
    print(text)
    if settings.write:
        write_section("per-sample-gradients", text)


if __name__ == "__main__":
    main()
