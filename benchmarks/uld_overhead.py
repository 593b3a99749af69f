"""What ULD costs per generated token: the pair of target and assistant against the target alone.

The assistant has the first K blocks of the target. Weights are random; the time does not depend on them.

Run: python benchmarks/uld_overhead.py [--layers 8] [--width 256] [--tokens 64] [--batch 8] [--repeats 5] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from speed_page import table, write_section
from torch import nn

from palimpsest.forget.language.combine import Combined, Difference
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.decoder import truncated


def seconds(model: nn.Module, ids: torch.Tensor, tokens: int) -> float:
    """Of writing so many tokens after each prompt."""
    start = time.perf_counter()
    model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False,
    )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    settings = parser.parse_args()
    length = settings.prompt + settings.tokens
    target = small_llama(settings.vocabulary, settings.width, settings.layers, heads=4, length=length)
    ids = torch.randint(
        3, settings.vocabulary, (settings.batch, settings.prompt), generator=torch.Generator().manual_seed(0)
    )
    depths = sorted({1, settings.layers // 4, settings.layers // 2} - {0})
    models: dict[str, nn.Module] = {"target alone": target}
    for depth in depths:
        pair = Combined(target, [truncated(target, depth)], Difference(0.8, 0.01))
        models[f"with an assistant of {depth} of {settings.layers} blocks"] = pair
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        seconds(model, ids, 4)  # nothing is measured while libraries load
    for _ in range(settings.repeats):  # in turn, so that a busy moment meets all
        for name, model in models.items():
            times[name].append(seconds(model, ids, settings.tokens))
    base = times["target alone"]
    rows: list[list[str]] = []
    for name, own in times.items():
        ratio = statistics.median(one / other for one, other in zip(own, base, strict=True))
        rows.append([name, f"{1000 * statistics.median(own) / settings.tokens:.2f}", f"{ratio:.2f}"])
    sizes = f"{settings.batch} prompts, {settings.tokens} tokens each, width {settings.width}."
    text = f"{sizes}\n\n{table(['model', 'ms per token of a batch', 'ratio to the target alone'], rows)}"
    print(text)
    if settings.write:
        write_section("uld-overhead", text)


if __name__ == "__main__":
    main()
