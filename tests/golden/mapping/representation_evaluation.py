"""Representation-level evaluation: CKA and nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from palimpsest.audit.similarity import batch_cka, knn_accuracy
from palimpsest.parts.cka import linear_cka, linear_hsic, rbf_cka

Data = dict[str, Any]


def _cka(inputs: Data, params: Data) -> Data:
    x, y = torch.tensor(inputs["X"]).double(), torch.tensor(inputs["Y"]).double()
    return {
        "linear_cka": linear_cka(x, y),
        "linear_hsic": linear_hsic(x, y),
        "rbf_cka_median_sigma": rbf_cka(x, y),
    }


def _cka_batch_mean(inputs: Data, params: Data) -> Data:
    x, y = torch.tensor(inputs["X"]).double(), torch.tensor(inputs["Y"]).double()
    values = batch_cka(x, y, params["batch_size"], as_released=True)
    return {"per_batch": values, "reported_percent": 100 * float(np.mean(values))}


def _knn_cosine(inputs: Data, params: Data) -> Data:
    train, test = np.array(inputs["train_x"]), np.array(inputs["test_x"])
    labels, truth = np.array(inputs["train_y"]), np.array(inputs["test_y"])
    return {"accuracy": knn_accuracy(train, labels, test, truth, params["k"])}


FUNCTIONS: dict[str, Callable[[Data, Data], Data]] = {
    "cka": _cka,
    "cka_batch_mean": _cka_batch_mean,
    "knn_cosine": _knn_cosine,
}
