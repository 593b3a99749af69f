"""What it saves to apply the head of a language model to the tokens that are scored, and to no others.

A training step, and the pass that serves every audit, on questions with short answers, as in benchmarks of
unlearning: a quarter of the tokens is scored. The same step is made with the logits of every position, as other
toolkits make it, and both losses are equal. Seconds are processor seconds; memory is the largest resident size of
a process of its own during its first step, beyond the model with its gradients.

Run: python benchmarks/scored_head.py [--quick] [--write]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_page import cpu_seconds, table, write_section
from torch import nn

from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.parts.tokens import IGNORED, joint_mean, token_losses
from palimpsest.tasks.language import Language

SHAPE = (16, 64)
SCORED = 16
WAYS = ("every position", "scored tokens")


def batch_of(vocabulary: int) -> dict[str, Any]:
    """Rows of tokens, of which the last are the answer."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, SHAPE, generator=random)
    labels = ids.clone()
    labels[:, :-SCORED] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(way: str, task: Language, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Token-mean loss of the answers."""
    labels = batch["labels"]
    whole = way == "every position"
    losses = token_losses(task.logits(model, batch), labels) if whole else task.token_losses(model, batch)
    return joint_mean(losses, labels)


def prepared(vocabulary: int, width: int) -> tuple[Language, nn.Module, dict[str, Any]]:
    """A task, a model and a batch."""
    torch.set_num_threads(1)
    task = Language(byte_pair_tokenizer(["Where is it? There."], 300))
    return task, small_llama(vocabulary, width=width, layers=4, heads=4), batch_of(vocabulary)


def stepper(way: str, task: Language, model: nn.Module, batch: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Forward and backward, as a function."""

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = loss_of(way, task, model, batch)
        loss.backward()
        return loss.detach()

    return step


def peak(way: str, vocabulary: int, width: int) -> float:
    """MB that a step takes beyond the model with its gradients; Linux forgets the peak of loading them on request."""
    task, model, batch = prepared(vocabulary, width)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss_of(way, task, model, batch).backward()
    return resident("VmHWM") - before


def resident(what: str) -> float:
    """MB in memory now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one vocabulary, one repeat")
    parser.add_argument("--way", help="measure the memory of this process: a JSON list")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    settings = parser.parse_args()
    if settings.way is not None:
        print(json.dumps(peak(*json.loads(settings.way))))
        return

    def apart(way: str, vocabulary: int, width: int) -> float:
        command = [sys.executable, __file__, "--way", json.dumps([way, vocabulary, width])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout.splitlines()[-1]))

    sizes, repeats = ([(16000, 64)], 1) if settings.quick else ([(2000, 256), (16000, 256), (50000, 256)], 5)
    rows: list[list[str]] = []
    furthest = 0.0
    for vocabulary, width in sizes:
        task, model, batch = prepared(vocabulary, width)
        steps = {way: stepper(way, task, model, batch) for way in WAYS}
        losses = [float(step()) for step in steps.values()]
        furthest = max(furthest, abs(losses[0] - losses[1]))
        seconds = {way: cpu_seconds(step, repeats) for way, step in steps.items()}
        more = {way: apart(way, vocabulary, width) for way in WAYS}
        for way in WAYS:
            rows.append([f"{vocabulary:,}", way, f"{seconds[way]:.2f}", f"{more[way]:.0f}"])
        ratios = [f"{figures[WAYS[0]] / figures[WAYS[1]]:.1f}" for figures in (seconds, more)]
        rows.append([f"{vocabulary:,}", "ratio", *ratios])
    about = f"{SHAPE[0]} rows of {SHAPE[1]} tokens, {SCORED} of each scored; largest difference of a loss {furthest:.0e}."
    headings = ["vocabulary", "logits of", "processor seconds of a step", "MB of a step"]
    text = f"{about}\n\n{table(headings, rows)}"
    print(text)
    if settings.write:
        write_section("scored-head", text)


if __name__ == "__main__":
    main()
