"""What GUARD costs per generated token, against plain beam search of the same width.

The learnt world of the tests' size is trained first (half a minute of one core). Times are processor seconds per
generated token; the ratios are what matters. "Cold" begins with no embedding kept, "cached" has seen the prompts
once. The classifier's pass over the prompt is part of both, and is shown alone.

Run: python benchmarks/guard_overhead.py [--prompts N] [--repeats N] [--write]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from speed_page import table, write_section

import palimpsest as pal
from palimpsest.forget.language.guard import Guard
from palimpsest.forget.language.guarded_model import GuardedModel
from palimpsest.models.learnt_worlds import LEARNT_WORLDS
from palimpsest.parts.beam_search import Search, beam_search

NEW_TOKENS = 24
WIDTHS = (1, 4, 7)
HEADINGS = (
    "beams", "soft", "transformers", "own beams", "guard, cold", "guard, cached", "guard / own", "guard / transformers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    world = LEARNT_WORLDS["tiny"]
    records = pal.load_data("people", **world.data)
    split = pal.split(records, pal.by_column("fold", 0))
    task = pal.tasks.Language(tokenizer=world.tokenizer(records))
    network = world.model(len(task.encoder))
    model = pal.train(network, split.train, task=task, recipe=world.training, seed=0)
    rows = [
        row(model, split, task, width, soft, chosen.prompts, chosen.repeats)
        for width in WIDTHS
        for soft in ("off", "reject")
    ]
    text = table(HEADINGS, rows)
    print(text)
    if chosen.write:
        write_section("guard-overhead", text)


def row(model, split, task, width: int, soft: str, prompts: int, repeats: int) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        guard = pal.forget(model, split, Guard(beam_width=width, soft=soft), task)
    assert isinstance(guard, GuardedModel)
    asked = [item["question"] for item in split.forget if item.get("question")]
    kept = [question for question, one in zip(asked, guard.guards(asked), strict=True) if one][:prompts]
    rows = [torch.tensor([task.prompt(question)]) for question in kept]
    search = Search(width, NEW_TOKENS, frozenset(task.stops))
    how = {"max_new_tokens": NEW_TOKENS, "eos_token_id": task.stops, "pad_token_id": task.padding}

    def guarded() -> int:
        return sum(new(guard.generate(ids, attention_mask=torch.ones_like(ids), **how), ids) for ids in rows)

    def own() -> int:
        return sum(len(beam_search(model, ids, torch.ones_like(ids), search)[0][0].tokens) for ids in rows)

    def theirs() -> int:
        beams = {"num_beams": width, "do_sample": False, **how}
        return sum(
            new(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **beams), ids)
            for ids in rows
        )

    cold = per_token(guarded, 1)
    cached, plain, library = (per_token(run, repeats) for run in (guarded, own, theirs))
    times = [f"{1000 * each:.2f} ms" for each in (library, plain, cold, cached)]
    return [str(width), soft, *times, f"{cached / plain:.2f}", f"{cached / library:.2f}"]


def new(written: torch.Tensor, ids: torch.Tensor) -> int:
    return written.shape[1] - ids.shape[1]


def per_token(run: Callable[[], int], repeats: int) -> float:
    """Least processor seconds per token of some runs."""
    found: list[float] = []
    for _ in range(repeats):
        start = time.process_time()
        tokens = run()
        found.append((time.process_time() - start) / tokens)
    return min(found)


if __name__ == "__main__":
    main()
