"""Functions of the library behind golden/values/unlearning-comparator.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from palimpsest.audit.membership.privacy_score import (
    class_forgetting_accuracies,
    privacy_features,
    threshold_scan,
    worst_case_privacy_score,
)

Data = dict[str, Any]
DECIMALS = 3


def attack_features(inputs: Data, params: Data) -> Data:
    found = {}
    for side in ("unlearned", "retrained"):
        features = privacy_features(
            torch.tensor(inputs[f"logits_{side}"]), params["T_entropy"], params["T_confidence"]
        )
        found[side] = {name: values.tolist() for name, values in features.items()}
    return found


def privacy_score(inputs: Data, params: Data) -> Data:
    logits = [torch.tensor(inputs[f"logits_{side}"]) for side in ("unlearned", "retrained")]
    return {
        f"PS_{count}": worst_case_privacy_score(*logits, thresholds=count, decimals=DECIMALS)
        for count in (51, 201)
    }


def scan(inputs: Data, params: Data) -> Data:
    rows = threshold_scan(
        np.array(inputs["values_unlearn"]),
        np.array(inputs["values_retrain"]),
        inputs["bins"],
        tuple(inputs["range"]),
        inputs["direction"],
        DECIMALS,
    )
    return {"records": [row._asdict() for row in rows]}


def accuracy_metrics(inputs: Data, params: Data) -> Data:
    train, test = (torch.tensor(inputs[f"{part}_class_acc"]).double() for part in ("train", "test"))
    return class_forgetting_accuracies(train, test, inputs["forget_class"])


FUNCTIONS = {
    "attack_features": attack_features,
    "worst_case_privacy_score": privacy_score,
    "threshold_scan": scan,
    "accuracy_metrics": accuracy_metrics,
}
