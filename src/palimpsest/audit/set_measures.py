"""Measures of the features on one set: CKA as the mean over batches, neighbours on a fixed split."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.similarity import Kernel, Short, batch_cka, effective_rank, knn_accuracy
from palimpsest.core.errors import InvalidAudit

FITTED = 0.8
"""Share of a set that nearest neighbours are looked for among; the rest are the queries."""
FEWEST_IN_BATCH = 16
"""A batch of fewer rows says too little of biased CKA to count as much as a full one."""
ROWS_PER_RANK = 4
"""Biased CKA wants this many rows per batch for each effective dimension of the features."""


def mean_cka(
    x: Float[Tensor, "rows dim"],
    y: Float[Tensor, "rows other"],
    batch_size: int = 512,
    kernel: Kernel = "linear",
    debiased: bool = False,
    short: Short = "merge",
    order: Int[Tensor, " rows"] | None = None,
) -> tuple[float, int]:
    """Unweighted mean of the CKA of consecutive batches, and the number of batches.

    Args:
        x: Features of one model.
        y: Of another, of the same records in the same order.
        batch_size: Rows per batch, at least 16.
        kernel: "linear" or "rbf".
        debiased: Use the unbiased estimator.
        short: Whether a last batch of fewer than 16 rows joins the one before, or is left out.
        order: In which rows are dealt to batches; as they come by default.

    Raises:
        InvalidAudit: As `batch_cka`.
    """
    if order is not None and len(x) == len(y):
        x, y = x[order], y[order]
    values = batch_cka(
        x, y, batch_size, kernel=kernel, debiased=debiased, fewest=FEWEST_IN_BATCH, short=short
    )
    return float(np.mean(values)), len(values)


def batches_note(
    x: Float[Tensor, "rows dim"], labels: NDArray[np.integer], batch_size: int, batches: int
) -> str:
    """What a reader must know of the batches: how many, of how many classes, and whether they are too small."""
    per_batch = [len(np.unique(labels[i * batch_size : (i + 1) * batch_size])) for i in range(batches)]
    classes = len(np.unique(labels))
    said = f"{len(x)} rows in {batches} batch{'es' if batches > 1 else ''}"
    if batches > 1 and np.mean(per_batch) < 0.5 * classes:
        said += f" of {np.mean(per_batch):.1f} of {classes} classes (order='mixed' deals them out)"
    rank = effective_rank(x)
    if min(batch_size, len(x)) < ROWS_PER_RANK * rank:
        said += f"; few for an effective rank of {rank:.0f}: trust the debiased value"
    return said


def fixed_split(n: int, seed: int = 2) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of n rows to fit on (80 %) and to ask about (20 %), by a seed of their own.

    Raises:
        InvalidAudit: If one of the two would be empty.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    first = int(FITTED * n)
    if first < 1 or first == n:
        raise InvalidAudit(f"{n} rows cannot be split into rows to fit on and rows to ask about.")
    return order[:first], order[first:]


def neighbours_on_set(
    features: Float[np.ndarray, "rows dim"],
    labels: NDArray[np.integer],
    k: int = 5,
    seed: int = 2,
    share: float = 1.0,
    beside: tuple[Float[np.ndarray, "others dim"], NDArray[np.integer]] | None = None,
) -> tuple[float, int]:
    """How often the k nearest neighbours by cosine tell the class, and the number of queries.

    Args:
        features: Of the set.
        labels: Of the set.
        k: Number of neighbours, with equal votes.
        seed: Of the split into 80 % neighbours and 20 % queries.
        share: Of the neighbours that are used, as the published evaluation does for large sets.
        beside: Further rows that are split alike and are neighbours too, but no queries: a set of one class
            alone would always be told rightly.

    Raises:
        InvalidAudit: If there are fewer neighbours than k, or they are of one class.
    """
    bank, queries = fixed_split(len(labels), seed)
    bank = bank[: max(1, round(share * len(bank)))]
    rows, names = features[bank], labels[bank]
    if beside is not None:
        more = fixed_split(len(beside[1]), seed)[0]
        rows, names = np.concatenate([rows, beside[0][more]]), np.concatenate([names, beside[1][more]])
    if len(rows) < k:
        raise InvalidAudit(f"{k} neighbours were asked for, but there are {len(rows)} rows to fit on.")
    if len(np.unique(names)) < 2:
        raise InvalidAudit("All rows are of 1 class: neighbours would always be right.")
    return knn_accuracy(rows, names, features[queries], labels[queries], k), len(queries)
