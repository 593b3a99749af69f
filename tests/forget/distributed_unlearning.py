"""One short unlearning run, alone or as one of several processes: writes the weights that came out."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.gradient import GradientUnlearner
from palimpsest.forget.language.npo import NPO
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.tasks.language import Language

# Answers of very different length, so that a mean of means would show
ROWS = [
    {"question": f"What did number {at} say?", "answer": " ".join(["so it is"] * (1 + 3 * (at % 4)))}
    for at in range(23)
]


def unlearned(rule: str) -> dict[str, torch.Tensor]:
    """The weights after a few steps on forget batches of 5, in two microbatches each."""
    torch.set_num_threads(1)
    records = Records(ROWS)
    task = Language(byte_pair_tokenizer([row["question"] + row["answer"] for row in ROWS], 300))
    split = ForgetSplit(records.select(range(11)), records.select(range(11, 23)))
    model = small_llama(len(task.encoder), width=16, layers=1, heads=2)
    method = GradientUnlearner(
        objective=NPO(beta=0.1), rule=rule, lr=1e-2, epochs=2, batch_size=4, accumulate=2, optimizer="sgd",
        clip=None,
    )  # fmt: skip
    return method.unlearn(model, split, task, Runtime(device="cpu")).state_dict()


if __name__ == "__main__":
    weights = unlearned(sys.argv[2])
    runtime = Runtime(device="cpu")
    if runtime.rank == 0:
        own = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(own, sys.argv[1], {"processes": str(runtime.processes)})
