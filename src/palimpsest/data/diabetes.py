"""scikit-learn's diabetes table: how far a disease progressed within a year, for 442 patients."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.records import Records
from palimpsest.data.registry import dataset
from palimpsest.data.tables import quarters, standardised


@dataset("diabetes")
def diabetes() -> Records:
    """442 patients, input [10] of mean 0 and deviation 1, target 25 to 346, ids "patient-000" and so on.

    Columns: "age" in years, "decade" of age (20, 30, ...), "sex" (1, 2), and "quarter" of the target from 1
    (the lowest) to 4. Source: Efron, Hastie, Johnstone and Tibshirani, "Least Angle Regression" (2004),
    through scikit-learn.
    """
    from sklearn.datasets import load_diabetes

    raw, progression = load_diabetes(return_X_y=True, scaled=False)
    table, target = np.asarray(raw, np.float64), np.asarray(progression, np.float64)
    age = table[:, 0].round().astype(np.int64)
    columns = {
        "age": age,
        "decade": age // 10 * 10,
        "sex": table[:, 1].round().astype(np.int64),
        "quarter": quarters(target),
    }
    tensors = TensorDataset(standardised(table), torch.from_numpy(target).float())
    return Records(tensors, ids=[f"patient-{index:03d}" for index in range(len(target))], columns=columns)
