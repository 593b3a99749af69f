"""Auto MPG: how far 392 cars of the years 1970 to 1982 run on a gallon, as mlxtend bundles it."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.errors import MissingDependency
from palimpsest.core.records import Records
from palimpsest.data.registry import dataset
from palimpsest.data.tables import quarters, standardised

CYLINDERS, YEAR, ORIGIN = 0, 5, 6
"""Positions in the table as it comes; the seven before the name of the car are used."""


@dataset("auto-mpg")
def auto_mpg() -> Records:
    """392 cars, input [9] of mean 0 and deviation 1, target 9 to 46.6 miles per gallon, ids "car-000" and so on.

    The inputs are cylinders, displacement, horsepower, weight, acceleration, model year, and the origin as
    three indicators. Columns: "cylinders", "year", "origin" (1, 2, 3), and "quarter" of the target from 1
    (the lowest) to 4. Source: UCI Auto MPG (CC BY 4.0), through mlxtend.

    Raises:
        MissingDependency: Without mlxtend.
    """
    try:
        from mlxtend.data import autompg_data
    except ImportError as missing:
        raise MissingDependency("mlxtend", "data") from missing
    raw, miles = autompg_data()
    table, target = np.asarray(raw, np.float64)[:, : ORIGIN + 1], np.asarray(miles, np.float64)
    origin = table[:, ORIGIN].astype(np.int64)
    indicators = (origin[:, None] == np.unique(origin)).astype(np.float64)
    columns = {
        "cylinders": table[:, CYLINDERS].astype(np.int64),
        "year": table[:, YEAR].astype(np.int64),
        "origin": origin,
        "quarter": quarters(target),
    }
    inputs = standardised(np.concatenate([table[:, :ORIGIN], indicators], 1))
    tensors = TensorDataset(inputs, torch.from_numpy(target).float())
    return Records(tensors, ids=[f"car-{index:03d}" for index in range(len(target))], columns=columns)
