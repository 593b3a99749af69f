"""Small regressions that several tests share."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

import palimpsest as pal


def random_images(n=24, channels=3, side=32, targets=1, forget=8, dtype=torch.float32):
    """Random images with random targets, the first `forget` of them to be forgotten."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, side, side, generator=generator, dtype=dtype)
    y = torch.randn(n, targets, generator=generator, dtype=dtype) * 2 + 5
    records = pal.Records(TensorDataset(x, y[:, 0] if targets == 1 else y))
    return pal.ForgetSplit(records.select(range(forget)), records.select(range(forget, n)))


def mae(model, records, task):
    """Mean absolute error in the units of the targets."""
    batch = records.batch(range(len(records)), task.collate)
    with torch.no_grad():
        answered = task.predictions(task.logits(model, batch))
    return (answered - task.targets(batch)).abs().mean().item()


def predicted(model, records, task):
    """Predictions, [records]."""
    batch = records.batch(range(len(records)), task.collate)
    with torch.no_grad():
        return task.predictions(task.logits(model, batch))[:, 0].double().numpy()
