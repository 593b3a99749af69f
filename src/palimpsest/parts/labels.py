"""Labels of records, from their column where there is one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task


def labels_of(records: Records, task: Task, runtime: Runtime) -> NDArray[np.int64]:
    """Integer labels, [records]: the column `"label"`, or the field that the task calls so."""
    field = getattr(task, "label", "label")
    if field == "label" and records.has_column("label"):
        return np.asarray(records.column("label"))
    found = [torch.as_tensor(batch[field]).cpu() for batch in runtime.batches(records, task)]
    return torch.cat(found).numpy()
