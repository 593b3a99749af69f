"""What geometric disentanglement costs per optimizer step, as a ratio to the plain sum of the two losses.

Both descend on the same two losses of a small Llama, a forget and a retain batch per step, under AdamW. The sum
takes one backward pass through both, GU one through each, and then its algebra on flat vectors: whitening, a
basis of k retain gradients, the projection, and where steps are corrected an active-set problem. Ratios above 1
say how many times more processor time a step takes. The algebra grows with k and the parameters and not with
the batch: with more tokens per step the ratio falls.

Run: python benchmarks/gu_overhead.py [--quick] [--write]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from speed_page import cpu_seconds, table, write_section
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.forget.rules import rule_of
from palimpsest.models.small_llama import small_llama

VOCABULARY = 1000
RULES: dict[str, Any] = {
    "gu, k = 1": {"name": "gu", "rank": 1},
    "gu, k = 8": {"name": "gu", "rank": 8},
    "gu realised, k = 1": {"name": "gu", "rank": 1, "mode": "realised"},
    "gu realised, k = 8": {"name": "gu", "rank": 8, "mode": "realised"},
    "gu both, k = 8": {"name": "gu", "rank": 8, "mode": "both"},
    "pcgrad": "pcgrad",
}


def loss_on(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def stepper(model: nn.Module, rule: Any, batches: tuple[Tensor, Tensor], filled: int) -> Callable[[], None]:
    """One optimizer step under a rule, as a function; after `filled` steps the basis is full."""
    student = copy.deepcopy(model).train()
    parameters = list(student.parameters())
    update = rule_of(rule).begin(parameters, torch.optim.AdamW(parameters, 1e-5), 1.0)

    def step() -> None:
        update.add(-loss_on(student, batches[0]), loss_on(student, batches[1]), 1.0)
        update.finish()

    for _ in range(filled):
        step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small network, one batch size, one repeat")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    networks = (
        [{"width": 96, "layers": 2}]
        if settings.quick
        else [{"width": 160, "layers": 3}, {"width": 256, "layers": 4}]
    )
    sizes, repeats, filled = ([4], 1, 8) if settings.quick else ([4, 16], 5, 9)
    random = torch.Generator().manual_seed(0)
    rows: list[list[str]] = []
    for network in networks:
        model = small_llama(VOCABULARY, heads=4, **network)
        weights = sum(parameter.numel() for parameter in model.parameters())
        found: dict[str, list[str]] = {}
        for size in sizes:
            forget, retain = torch.randint(3, VOCABULARY, (2, size, 64), generator=random)
            plain = cpu_seconds(stepper(model, "sum", (forget, retain), 1), repeats)
            for name, rule in RULES.items():
                taken = cpu_seconds(stepper(model, rule, (forget, retain), filled), repeats)
                found.setdefault(name, []).append(f"{taken / plain:.2f}")
        rows += [[f"{weights:,}", name, *ratios] for name, ratios in found.items()]
    text = table(["parameters", "rule", *(f"{size} x 64 tokens a side" for size in sizes)], rows)
    print(text)
    if settings.write:
        write_section("gu-overhead", text)


if __name__ == "__main__":
    main()
