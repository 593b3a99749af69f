"""When views of a record are shown: V views side by side, and the record itself V times as rarely.

"Do Your Best and Get Enough Rest for Continual Learning" (Kang, Seifer, Lee, Ryu, CVPR 2025, arXiv
2503.18371). An epoch has as many slots as before; V epochs in a row (a cycle) go through the records once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords

Reduction = Literal["published", "official_code"]


def epoch_length(records: int, rounded_to: int = 0) -> int:
    """Slots of an epoch: as many as records, rounded down to a multiple of `rounded_to` (0 rounds nothing).

    Raises:
        InvalidHyperparameter: If nothing would be left.

    Example:
        >>> epoch_length(1000, 256)
        768
    """
    if rounded_to < 0 or rounded_to > records:
        raise InvalidHyperparameter(
            f"Epochs of {records} records cannot be rounded down to a multiple of {rounded_to}: take 0."
        )
    return records - records % rounded_to if rounded_to else records


def slots(epoch: int, length: int, records: int, views: int) -> Int[Tensor, " slots"]:
    """Places that an epoch serves in the list of its cycle, in which every record stands V times in a row.

    The place says the record (place // V in the order of the cycle) and the view (place % V).
    """
    start = (epoch % views) * length
    return torch.arange(start, min(start + length, records * views))


def served(
    permutation: Int[Tensor, " records"], epoch: int, views: int, rounded_to: int = 0
) -> Int[Tensor, " slots"]:
    """Records that an epoch serves, slot by slot, from the order of its cycle (epoch // V).

    Example:
        >>> served(torch.tensor([2, 0, 1, 3]), 1, views=2).tolist()
        [1, 1, 3, 3]
    """
    count = len(permutation)
    return permutation[slots(epoch, epoch_length(count, rounded_to), count, views) // views]


def cuts(view: Int[Tensor, " slots"], batch_size: int, views: int) -> list[tuple[int, int]]:
    """Where an epoch is cut into batches: never between views of a record.

    An epoch whose length is no multiple of V begins or ends within the views of one record; those at its
    beginning go into its first batch. A single slot at the end joins the batch before.
    """
    whole = int((views - view[0]) % views)
    edges = [0, *range(whole + batch_size, len(view), batch_size), len(view)]
    if views > 1 and len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    return list(pairwise(edges))


def pairs(view: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Rows of first views and of the further views of the same records.

    Args:
        view: Number of each row's view, from 0; views of a record stand in a row. Rows whose first view is
            in another batch have no pair.
    """
    rows = torch.arange(len(view), device=view.device)
    first = rows - view
    paired = (view > 0) & (first >= 0)
    return first[paired], rows[paired]


def divergence(
    logits: Float[Tensor, "rows classes"],
    view: Int[Tensor, " rows"],
    reduction: Reduction = "published",
) -> Float[Tensor, ""]:
    """One-to-many divergence: mean over further views of KL(p_first || p_view), no gradient on first views.

    Args:
        logits: Of the classes met.
        view: Number of each row's view, see `pairs`.
        reduction: "official_code" divides by the number of classes, as the released code does.

    Returns:
        0 without pairs.

    Raises:
        InvalidHyperparameter: For an unknown reduction.
    """
    if reduction not in ("published", "official_code"):
        raise InvalidHyperparameter(
            f"The reduction must be 'published' or 'official_code', not {reduction!r}."
        )
    first, others = pairs(view)
    if len(first) == 0:
        return logits.new_zeros(())
    log_p = F.log_softmax(logits, 1)
    target = log_p[first].detach()
    loss = F.kl_div(log_p[others], target, reduction="batchmean", log_target=True)
    return loss / logits.shape[1] if reduction == "official_code" else loss


def check_batch(batch_size: int, views: int, records: int) -> None:
    """Check that a batch holds whole groups of views, and the records fill one.

    Raises:
        InvalidHyperparameter: If the batch size is no multiple of V.
        InvalidRecords: If there are fewer records than a batch has unique ones.
    """
    if batch_size % views:
        raise InvalidHyperparameter(
            f"A batch of {batch_size} slots cannot hold {views} views of each record: take a multiple of {views}."
        )
    if records < batch_size // views:
        raise InvalidRecords(
            f"{records} records do not fill one batch of {batch_size // views} with {views} views each: "
            "take a smaller batch."
        )
