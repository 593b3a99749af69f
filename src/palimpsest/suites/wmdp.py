"""WMDP as a benchmark: on the published files with the user's model, or on invented guild secrets."""

from __future__ import annotations

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.suites.benchmark import Tree, benchmark
from palimpsest.suites.people import settings_of

LEARNING: Tree = {
    "epochs": 100, "lr": 2e-3, "batch_size": 16, "optimizer": "adamw", "weight_decay": 0.01,
    "schedule": "cosine", "warmup": 0.1, "clip": 1.0,
}  # fmt: skip
"""Found by trying: after 20 epochs at 4e-3 a model of two blocks gives one letter throughout; after these, one of
three blocks answers every trained question, and 8 of 10 of those whose options stand in another order."""
FINE_TUNING: Tree = {
    "epochs": 1, "lr": 1e-5, "batch_size": 4, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.1,
}  # fmt: skip
"""Of a pretrained model on the texts: it has most of the knowledge already, and the controls all of that."""
OWN: dict[str, Tree] = {"rmu": {"steering": 3.0, "relative": True, "alpha": 10.0, "epochs": 4}}
"""Settings for a small Llama; RMU's were not found yet: see the benchmark's description."""


def wmdp_settings(method: str) -> Tree:
    """Settings of a method for the small model."""
    return {**settings_of(method), **OWN.get(method, {})}


@benchmark("wmdp", wmdp_settings)
def wmdp(model: str | None, data: str | None) -> Tree:
    """WMDP (ICML 2024): multiple choice on what must go and on what must stay; guild secrets without --data.

    RMU did not part the two invented domains in a model of two blocks that knew every trained question (seven
    settings of steering, alpha and rate, one seed): at rates of 1e-3 and 3e-3 nothing was forgotten, at 1e-2 both
    fell (0.45 and 0.75), at 2e-2 both were at chance.
    """
    if data is None and model is not None:
        raise InvalidHyperparameter(
            f"The guild secrets are learnt by a small model of the benchmark, not by '{model}': give --data with WMDP's "
            "files too."
        )
    audits: list[Tree] = [{"name": "wmdp", "settings": {}}, {"name": "cost"}]
    if data is None:
        audits[0]["settings"] = {"prompt": "task"}
        return {
            "name": "wmdp-guild-secrets",
            "data": {"name": "guild-secrets", "settings": {"facts": 20}},
            "model": {"name": "small_llama", "settings": {"width": 96, "layers": 3, "heads": 4}},
            "task": {"name": "language", "settings": {"vocabulary": 1000}},
            "training": LEARNING,
            "forget": ["domain=guilds"],
            "controls": 2,
            "audits": audits,
        }
    if model is None:
        raise InvalidHyperparameter(
            "WMDP's questions need a model that knows something of them: give --model."
        )
    return {
        "name": "wmdp",
        "data": {"name": "wmdp", "settings": {"source": data}},
        "model": {"name": f"hf:{model}", "settings": {}},
        "task": {"name": "language", "settings": {"tokenizer": model, "max_length": 768}},
        "training": FINE_TUNING,
        "forget": ["domain=bio,cyber,chem"],
        "controls": 1,
        "audits": audits,
    }
