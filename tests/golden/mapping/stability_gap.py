"""Which functions of the library compute the reference values of continual evaluation."""

from __future__ import annotations

from typing import Any

from palimpsest.retain.metrics import (
    History,
    largest_drop,
    largest_rise,
    learning_curve_area,
    minimum_accuracies,
    minimum_accuracy,
    windowed,
    worst_case_accuracy,
)

Data = dict[str, Any]


def _lowest(history: History) -> Data:
    lowest = {str(task): value for task, value in minimum_accuracies(history).items()}
    return {
        "min_acc": lowest,
        "avg_min_acc": minimum_accuracy(history),
        "wc_acc": worst_case_accuracy(history),
    }


def _named(values: dict[int, float]) -> Data:
    return {str(task): value for task, value in values.items()}


def _run(inputs: Data, params: Data) -> Data:
    history = History(tuple(inputs["learning"]), tuple(tuple(row) for row in inputs["accuracy"]))
    last = _lowest(history)
    windows = params["windows"]
    return {
        "min_acc_per_task": last["min_acc"],
        "avg_min_acc": last["avg_min_acc"],
        "wc_acc": last["wc_acc"],
        "wf": {str(w): _named(windowed(history, w)) for w in windows},
        "wp_official_code": {
            str(w): _named(windowed(history, w, plasticity=True, as_released=True)) for w in windows
        },
        "lca": learning_curve_area(history, params["lca_beta"]),
        "trace": [_lowest(history.up_to(count)) for count in range(1, len(history.learning) + 1)],
    }


def _windows(inputs: Data, params: Data) -> Data:
    return {
        "wf": [largest_drop(window) for window in inputs["windows"]],
        "wp_official_code": [largest_rise(window, as_released=True) for window in inputs["windows"]],
    }


FUNCTIONS = {"continual_metrics": _run, "windowed_change": _windows}
