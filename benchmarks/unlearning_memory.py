"""Peak memory of an unlearning run with and without a reference model beside the model.

NPO compares likelihoods of whole answers with the original's. They are computed once, before the first step, so
no second model is kept; only a retain term that compares whole distributions ("kl") needs one. Every figure is
the largest resident size of a process of its own that makes a few steps, less that of one that only loads the
model, in multiples of the model's own size.

Run: python benchmarks/unlearning_memory.py [--width 512] [--write]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

from speed_page import table, write_section

WAYS = {
    "NPO, likelihoods computed once": {"retain": "nll"},
    "NPO, KL retain term: a reference model": {"retain": "kl"},
    "NPO without a retain term": {"retain": "none"},
}


def measure(width: int, settings: dict[str, str] | None) -> tuple[float, float]:
    """Peak resident MB of this process after a few steps (None: only the model), and the model's own MB."""
    import torch

    from palimpsest.core.records import Records
    from palimpsest.core.runtime import Runtime
    from palimpsest.core.split import ForgetSplit
    from palimpsest.forget.language.npo import NPO
    from palimpsest.models.small_llama import small_llama
    from palimpsest.parts.byte_pairs import byte_pair_tokenizer
    from palimpsest.tasks.language import Language

    torch.set_num_threads(1)
    rows = [{"question": f"Where is number {at}?", "answer": f"At place {at}."} for at in range(16)]
    records = Records(rows)
    task = Language(byte_pair_tokenizer([row["question"] + row["answer"] for row in rows], 300))
    model = small_llama(len(task.encoder), width=width, layers=6, heads=8)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    if settings is not None:
        split = ForgetSplit(records.select(range(4)), records.select(range(4, 16)))
        method = NPO(**settings, max_steps=2, batch_size=4, optimizer="sgd", clip=None)  # pyright: ignore[reportArgumentType]
        method.unlearn(model, split, task, Runtime(device="cpu"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--way", help="measure this process: a JSON object of settings, or null")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    given = parser.parse_args()
    if given.way is not None:
        print(json.dumps(measure(given.width, json.loads(given.way))))
        return

    def apart(settings: dict[str, str] | None) -> tuple[float, float]:
        command = [sys.executable, __file__, "--width", str(given.width), "--way", json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return tuple(json.loads(done.stdout.splitlines()[-1]))

    before, size = apart(None)
    rows: list[list[str]] = []
    for name, settings in WAYS.items():
        peak, _ = apart(settings)
        rows.append([name, f"{peak - before:.0f}", f"{(peak - before) / size:.1f}"])
    about = f"A model of {size:.0f} MB; SGD, so that no optimizer state blurs the picture."
    text = f"{about}\n\n{table(['way', 'MB more', 'multiples of the model'], rows)}"
    print(text)
    if given.write:
        write_section("unlearning-memory", text)


if __name__ == "__main__":
    main()
