"""Which functions of the library compute the reference values of power-law recurrence."""

from __future__ import annotations

from typing import Any

from palimpsest.retain.recurrence import Law, Recurrence, counts

Data = dict[str, Any]
Table = list[list[int]]
LAW: dict[str, Law] = {
    "powerlaw_unrestricted": "free-power",
    "powerlaw": "power",
    "uniform": "uniform",
    "exponential": "exponential",
    "lower": "sequential",
    "upper": "full",
}


def _counts(inputs: Data, params: Data) -> Table:
    recurrence = Recurrence(
        LAW.get(params["distribution"], params["distribution"]),
        params.get("replay_fraction") or 1.0,
        a=params.get("alpha", 5.0),
        b=params.get("beta", 1.0),
    )
    return counts(params["num_tasks"], params["max_samples"], recurrence).tolist()


FUNCTIONS = {"count_matrix": _counts}
