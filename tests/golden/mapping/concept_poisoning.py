"""Which functions of the library compute the reference values of concept poisoning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.audit.membership.forgetting_rate import forgetting_rate
from palimpsest.parts.answer_words import mask_answer, merge_words, normalize_word
from palimpsest.parts.concept_bank import ConceptBank
from palimpsest.parts.concept_bottleneck import ConceptBottleneck, choose_donor
from palimpsest.parts.token_attribution import answer_score, token_attribution
from palimpsest.parts.windows import Grid, cut, paste, peaks

Data = dict[str, Any]


class ToyLanguageModel(nn.Module):
    """h_t = tanh(A (e_t + half the sum of the embeddings before it)); logits_t = U h_t."""

    def __init__(self, inputs: Data):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.tensor(inputs["E"]))
        self.A, self.U = torch.tensor(inputs["A"]), torch.tensor(inputs["U"])

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embedding(ids)
        return torch.tanh((e + 0.5 * (e.cumsum(1) - e)) @ self.A.T) @ self.U.T


def _ig(inputs: Data, params: Data) -> Data:
    model, ids = ToyLanguageModel(inputs), torch.tensor([inputs["input_ids"]])
    positions = torch.tensor(inputs["response_positions"])
    answered = torch.zeros_like(ids, dtype=torch.bool)
    answered[:, positions] = True
    given = inputs.get("baseline_ids")
    baseline = ids.masked_fill(answered, 0) if given is None else torch.tensor(given).reshape(1, -1)
    found = token_attribution(
        model,
        lambda tokens, true: answer_score(model(tokens), true, positions),
        ids,
        None if params.get("zero_baseline") else baseline,
        ids,
        zeroed=answered,
        steps=params["steps"],
        quadrature="published",
    )
    return {
        "attributions": found.values[0].tolist(),
        "score_input": found.score_input.item(),
        "score_baseline": found.score_baseline.item(),
        "completeness_error": found.completeness_error.item(),
    }


def _peak(inputs: Data, params: Data) -> Data:
    scores = torch.tensor(inputs["map"])
    maps = scores.reshape(1, *scores.shape[:2], -1)
    side, stride = params["patch"], params["stride"]
    centers, concepts, values = peaks(maps, Grid((side, side), (stride, stride)))
    return {
        "center_xy": centers[0].tolist(),
        "concept_index": int(concepts[0]),
        "peak": float(values[0]),
    }


def _plane(values: Any) -> Tensor:
    image = torch.tensor(values)
    return image.reshape(1, -1, *image.shape[-2:])


def _paste(inputs: Data, params: Data) -> Data:
    target, donor, size = _plane(inputs["target"]), _plane(inputs["donor"]), params["size"]
    patch = cut(donor, torch.tensor([params["donor_center"]]), (size, size))
    result = paste(target, patch, torch.tensor([params["target_center"]]))
    lead = torch.tensor(inputs["target"]).shape[:-2]
    return {
        "patch": patch.reshape(*lead, size, size).tolist(),
        "result": result.reshape(*lead, *result.shape[-2:]).tolist(),
    }


def _donor(inputs: Data, params: Data) -> Data:
    weights = torch.tensor(inputs["weights"])
    rows = []
    for label in range(len(weights)):
        found = choose_donor(weights, label, params["rule"], params["topk"])
        rows.append(
            {
                "class": label,
                "target_concept": found.target_concept,
                "donor_class": found.donor_class,
                "donor_concept": found.donor_concept,
                "donor_rank": found.donor_rank,
            }
        )
    return {"rows": rows}


def _merge(inputs: Data, _: Data) -> Data:
    words = merge_words(inputs["tokens"], inputs["scores"])
    return {
        "words": [list(word) for word in words],
        "normalized": [normalize_word(word) for word, _ in words],
    }


def _mask(inputs: Data, params: Data) -> Data:
    masked, picked = mask_answer(inputs["answer"], inputs["ranked"], params["k"], params["mask"])
    return {"masked": masked, "picked": picked}


def _pcbm(inputs: Data, _: Data) -> Data:
    vectors, intercepts, norms, weight, bias, embeddings = (
        torch.tensor(inputs[name]) for name in ("cavs", "intercepts", "norms", "W", "b", "emb")
    )
    bank = ConceptBank(tuple(map(str, range(len(vectors)))), vectors, intercepts, norms)
    bottleneck = ConceptBottleneck(bank, weight, bias)
    return {"margins": bank.margins(embeddings).tolist(), "logits": bottleneck.logits(embeddings).tolist()}


def _rate(inputs: Data, params: Data) -> Data:
    sides = (np.asarray(inputs[name]) for name in ("orig_member", "orig_nonmember", "unlearned_member"))
    return {"Fr": forgetting_rate(*sides, seed=params.get("seed", 42))}


FUNCTIONS = {
    "ig": _ig,
    "peak": _peak,
    "paste": _paste,
    "donor": _donor,
    "merge_words": _merge,
    "mask_answer": _mask,
    "pcbm_forward": _pcbm,
    "forgetting_rate": _rate,
}
