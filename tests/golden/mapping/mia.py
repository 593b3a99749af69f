"""Functions of the library behind golden/values/mia.json.

The reference scores of language models are losses (low = member), the library's are high for members.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from palimpsest.audit.membership import language_signals as language
from palimpsest.audit.membership import lira, population, signals
from palimpsest.audit.membership.challenge import forgetting_score, record_epsilons
from palimpsest.audit.membership.one_run import one_run_epsilon, one_run_p_value
from palimpsest.audit.membership.rates import auc, best_accuracy, tpr_at
from palimpsest.audit.membership.rmia import rmia

Data = dict[str, Any]


def llm_attacks(inputs: Data, params: Data) -> Data:
    table, bias = (nn.Parameter(torch.tensor(inputs[name])) for name in ("W", "bias"))
    reference = torch.tensor(inputs["W_ref"]), torch.tensor(inputs["bias_ref"])
    k, p = params["k"], params["p"]

    def scores(item: Data) -> dict[str, float]:
        ids, labels = torch.tensor(item["input_ids"]), torch.tensor(item["labels"])
        at = torch.nonzero(labels[1:] != -100)[:, 0]
        targets, before = labels[1:][at], ids[:-1][at]
        logits = table[before] + bias
        lp = language.token_log_probabilities(logits, targets)
        lp_ref = language.token_log_probabilities(reference[0][before] + reference[1], targets)
        standard = language.standardised_log_probabilities(logits, targets)
        text = " ".join(inputs["words"][int(token)] for token in targets)
        found = {
            "loss": language.mean_log_probability(lp),
            "zlib": language.zlib_score(lp, text),
            "min_k": language.min_k(lp[:-1], k),
            "min_k++": language.min_k(standard[:-1], k),
            "reference": language.reference_score(lp, lp_ref),
            f"gradnorm_p{p}": language.gradient_norm(-lp[:-1].mean(), [table, bias], p),
        }
        return {name: -value for name, value in found.items()}

    sides = {side: [scores(item) for item in inputs[side]] for side in ("forget", "holdout")}
    found: Data = {}
    for name in sides["forget"][0]:
        values = {side: [item[name] for item in items] for side, items in sides.items()}
        found[name] = {**values, "auc": auc(np.array(values["holdout"]), np.array(values["forget"]))}
    return found


def classifier_attacks(inputs: Data, params: Data) -> Data:
    sides = ("shadow_train", "shadow_test", "target_train", "target_test")
    probabilities = {side: torch.tensor(inputs[side]["probs"]).double() for side in sides}
    labels = {side: torch.tensor(inputs[side]["labels"]) for side in sides}
    own = {side: probabilities[side].gather(1, labels[side][:, None])[:, 0] for side in sides}
    high = {
        "confidence": own,
        "entropy": {side: -signals.entropy(probabilities[side]) for side in sides},
        "m_entropy": {side: -signals.modified_entropy(probabilities[side], labels[side]) for side in sides},
    }
    right = {side: (probabilities[side].argmax(1) == labels[side]).numpy() for side in sides}
    threshold: Data = {
        "correctness": population.correctness_attack(right["target_train"], right["target_test"])
    }
    for name, values in high.items():
        arrays = [population.Labelled(values[side].numpy(), labels[side].numpy()) for side in sides]
        threshold[name] = population.threshold_attack(*arrays)
    features = {
        "confidence": {side: own[side].numpy()[:, None] for side in sides},
        "entropy": {side: -high["entropy"][side].numpy()[:, None] for side in sides},
        "prob": {side: probabilities[side].numpy() for side in sides},
    }
    svc = params.get("svc", {})
    return {
        "threshold_attack": {name: list(shares) for name, shares in threshold.items()},
        "m_entropy_target_test": (-high["m_entropy"]["target_test"]).tolist(),
        "entropy": {side: (-high["entropy"][side]).tolist() for side in sides},
        "svc_forget_efficacy": {
            name: population.svc_attack(
                values["shadow_train"], values["shadow_test"], values["target_test"], svc.get("C", 3)
            )
            for name, values in features.items()
        },
    }


def lira_attacks(inputs: Data, params: Data) -> Data:
    keep, scores = np.array(inputs["keep"], bool), np.array(inputs["scores"], float)
    attacked = params["attacked_models"]
    shadows, inside = scores[:-attacked], keep[:-attacked]
    kinds: dict[str, Any] = {
        "online": lambda phi: lira.lira_online(phi, shadows, inside),
        "online_fixed_variance": lambda phi: lira.lira_online(
            phi, shadows, inside, "global", as_released=True
        ),
        "offline": lambda phi: lira.lira_offline(phi, shadows, inside, as_released=True),
        "offline_fixed_variance": lambda phi: lira.lira_offline(
            phi, shadows, inside, "global", as_released=True
        ),
        "global": lira.global_threshold,
    }
    truth = keep[-attacked:].ravel()
    found: Data = {}
    for name, attack in kinds.items():
        score = np.concatenate([attack(phi) for phi in scores[-attacked:]])
        found[name] = {
            "prediction": (-score).tolist(),
            "auc": auc(score[truth], score[~truth]),
            "acc": best_accuracy(score[truth], score[~truth]),
        }
    return found


def rmia_and_rates(inputs: Data, params: Data) -> Data:
    scores = rmia(
        np.array(inputs["target_signals"], float),
        np.array(inputs["ref_signals"], float).T,
        np.array(inputs["ref_memberships"], bool).T,
        np.array(inputs["population_target"], float),
        np.array(inputs["population_ref"], float).T,
        params["offline_a"],
        params["gamma"],
        as_released=True,
    )
    truth = np.array(inputs["memberships"], bool)
    members, others = scores[truth], scores[~truth]
    rates = {"1pct": 0.01, "0.1pct": 0.001, "0": 0.0}
    return {
        "scores": scores.tolist(),
        "auc": auc(members, others),
        **{f"tpr_at_{name}": tpr_at(members, others, a, strict=False).rate for name, a in rates.items()},
        "one_run_dp_audit": [
            {
                "eps_lower": one_run_epsilon(**case),
                "p_value_at_eps1": one_run_p_value(case["m"], case["r"], case["v"], 1.0, case["delta"]),
            }
            for case in inputs["dp_audits"]
        ],
    }


def challenge(inputs: Data, params: Data) -> Data:
    unlearned, retrained = (np.array(inputs[f"{side}_confs"], float) for side in ("unlearned", "retrained"))
    logits, targets = torch.tensor(inputs["logits"]), torch.tensor(inputs["targets"])
    return {
        "epsilons": record_epsilons(unlearned, retrained, params["delta"]).tolist(),
        "forget_score": forgetting_score(unlearned, retrained, params["delta"]),
        "prob_correct": signals.true_probability(logits, targets).tolist(),
        "logit_scaled_confidence": signals.scaled_confidence(logits, targets).tolist(),
    }


FUNCTIONS = {
    "llm_attacks": llm_attacks,
    "classifier_attacks": classifier_attacks,
    "lira": lira_attacks,
    "rmia_and_rates": rmia_and_rates,
    "forgetting_score": challenge,
}
