"""Functions of the library behind golden/values/muse.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from palimpsest.audit.answers import rouge_score
from palimpsest.audit.membership import privacy_leak as leak
from palimpsest.audit.membership.language_signals import token_log_probabilities
from palimpsest.audit.membership.rates import best_accuracy
from palimpsest.forget.language.arithmetic import negate_task_vector
from palimpsest.parts.logit_combination import whp_logits
from palimpsest.parts.tokens import token_mean
from palimpsest.suites import muse_scores as muse

Data = dict[str, Any]


def privleak(inputs: Data, params: Data) -> Data:
    sides = {
        name: (np.array(side["forget"], float), np.array(side["holdout"], float))
        for name, side in inputs.items()
    }
    found: Data = {}
    for name, (forget, holdout) in sides.items():
        value = leak.privacy_auc(forget, holdout)
        found[name] = {
            "muse_auc_forget_holdout": value,
            "muse_auc_holdout_forget": leak.privacy_auc(holdout, forget),
            "best_accuracy": best_accuracy(-holdout, -forget),
            "open_unlearning_auc": leak.privacy_auc(forget, holdout, "open-unlearning"),
        }
        if name != "retrain":
            found[name]["privleak_percent"] = leak.measure_privacy_leak(
                (forget, holdout), sides["retrain"]
            ).percent
    return found


def mia_signals(inputs: Data, params: Data) -> Data:
    def scores(logits: str, ids: str) -> torch.Tensor:
        tokens = torch.tensor(inputs[ids])
        return token_log_probabilities(torch.tensor(inputs[logits])[:-1], tokens[1:])

    return leak.released_signals(
        scores("logits", "ids"),
        scores("logits_lower", "ids_lower"),
        scores("logits_ref", "ids"),
        inputs["text"],
        params["ratios"],
    )


def knowmem_rouge(inputs: Data, params: Data) -> Data:
    answers = [pair["answer"] for pair in inputs["pairs"]]
    found = muse.knowmem([pair["raw_generation"] for pair in inputs["pairs"]], answers, params["stop"])
    words = rouge_score(found.cut, answers, "rouge1")
    columns = {
        "rougeL": list(found.f1),
        "rougeL_recall": list(found.recall),
        "rouge1": [score.f1 for score in words],
        "rouge1_recall": [score.recall for score in words],
    }
    report = {f"max_{name}": max(values) for name, values in columns.items()}
    report |= {f"mean_{name}": sum(values) / len(values) for name, values in columns.items()}
    assert abs(report["mean_rougeL"] * 100 - found.value) < 1e-9
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"cut": list(found.cut), "per_item": rows, "report": report}


def whp_and_task_vector(inputs: Data, params: Data) -> Data:
    logits = whp_logits(
        torch.tensor(inputs["base_logits"]), torch.tensor(inputs["reinforced_logits"]), params["alpha"]
    )
    target, tuned = (
        {name: torch.tensor(values) for name, values in inputs[state].items()}
        for state in ("target_state", "finetuned_state")
    )
    state = negate_task_vector(target, tuned, scale=params["alpha"])
    return {
        "whp_logits": logits.tolist(),
        "whp_loss": float(token_mean(logits, torch.tensor(inputs["labels"]))),
        "task_vector_state": {name: tensor.tolist() for name, tensor in state.items()},
    }


FUNCTIONS = {
    "privleak": privleak,
    "mia_signals": mia_signals,
    "knowmem_rouge": knowmem_rouge,
    "whp_and_task_vector": whp_and_task_vector,
}
