"""Functions of the library behind golden/values/tofu.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from palimpsest.audit import memorisation, truth_ratio
from palimpsest.audit.membership.language_signals import label_log_probabilities, without_last
from palimpsest.parts.tokens import mean_losses
from palimpsest.suites import tofu_logs, tofu_scores

Data = dict[str, Any]
TITLES = {"real_authors": "Real Authors", "world_facts": "Real World", "retain": "Retain", "forget": "Forget"}


def aggregate(inputs: Data, params: Data) -> Data:
    leaderboard, arithmetic = (
        tofu_logs.log_scores(inputs["unlearned"], mean) for mean in ("geometric", "arithmetic")
    )
    found: Data = {"leaderboard": {"Model Utility": leaderboard.utility}}
    found["arithmetic"] = {"Model Utility": arithmetic.utility}
    for name, title in TITLES.items():
        if name in leaderboard.sets:
            scores, other = leaderboard.sets[name], arithmetic.sets[name]
            found["leaderboard"] |= {
                f"ROUGE {title}": scores.rouge,
                f"Prob. {title}": scores.probability,
                f"Truth Ratio {title}": scores.truth_ratio,
            }
            found["arithmetic"] |= {
                f"{title} ROUGE": other.rouge,
                f"{title} Probability": other.probability,
                f"{title} Truth Ratio": other.truth_ratio,
            }
    return {**found, "forget_quality": _quality(inputs["unlearned"], inputs["retain"])}


def real_logs(inputs: Data, params: Data) -> Data:
    sides = ({tofu_logs.FORGET_FILE: inputs[side]} for side in ("unlearned", "retain"))
    return _quality(*sides)


def open_unlearning(inputs: Data, params: Data) -> Data:
    tiny = params.get("eps", truth_ratio.TINY)
    correct, wrong = np.array(inputs["correct_loss"]), np.array(inputs["wrong_loss"])
    reference = np.array(inputs["retain_correct_loss"]), np.array(inputs["retain_wrong_loss"])
    ratios = truth_ratio.truth_ratios(correct, wrong, tiny=tiny)
    sides = (ratios, truth_ratio.truth_ratios(*reference, tiny=tiny))
    by_item = [{str(index): float(value) for index, value in enumerate(side)} for side in sides]
    shares = truth_ratio.truth_probabilities(correct, wrong, tiny)
    options = truth_ratio.option_probabilities(correct, wrong, tiny)
    return {
        "truth_ratio_closer_to_1_better": {
            "agg": truth_ratio.closer_to_one(ratios),
            "per_item": ratios.tolist(),
        },
        "truth_ratio_true_better": {"agg": truth_ratio.truth_preferred(ratios), "per_item": ratios.tolist()},
        "truth_ratio_prob_mean": {"agg": float(shares.mean()), "per_item": shares.tolist()},
        "forget_quality_p": truth_ratio.forget_quality(*by_item).p,
        "probability_w_options": {"agg": float(options.mean()), "per_item": options.tolist()},
        "hm_aggregate": tofu_scores.harmonic_mean(inputs["nine_metrics"]),
    }


def token_metrics(inputs: Data, params: Data) -> Data:
    logits, labels = torch.tensor(inputs["logits"]), torch.tensor(inputs["labels"])
    losses = mean_losses(logits, labels)
    lp, mask = label_log_probabilities(logits, labels)
    mask = without_last(mask)
    # The released extraction strength has a floor of 1/L.
    found = memorisation.memorisation(logits, labels, as_released=True)
    exact = [None if value != value else value for value in found.exact.tolist()]
    return {
        "avg_loss": losses.tolist(),
        "prob": found.probability.tolist(),
        "token_logprobs": [row[kept].tolist() for row, kept in zip(lp, mask, strict=True)],
        "exact_memorization": {"agg": memorisation.mean_over_texts(found.exact)[0], "per_item": exact},
        "extraction_strength": {"agg": float(found.strength.mean()), "per_item": found.strength.tolist()},
    }


def _quality(unlearned: Data, reference: Data) -> Data:
    found = tofu_logs.log_forget_quality(unlearned, reference)
    return {"p_value": found.p, "ks_statistic": found.statistic}


FUNCTIONS = {
    "aggregate": aggregate,
    "real_logs": real_logs,
    "open_unlearning": open_unlearning,
    "token_metrics": token_metrics,
}
