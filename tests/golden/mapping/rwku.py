"""Functions of the library behind golden/values/rwku.json."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from palimpsest.audit.answer_quality import fluency
from palimpsest.audit.answers import rouge_unique_words
from palimpsest.audit.membership import language_signals as signals
from palimpsest.parts.tokens import IGNORED
from palimpsest.suites import rwku_side_scores as rwku

Data = dict[str, Any]


def rouge_l_recall(inputs: Data, params: Data) -> Data:
    scores = rouge_unique_words(inputs["predictions"], inputs["answers"], params["empty_token"])
    recall = [score.recall for score in scores]
    return {
        "rouge_l_recall": recall,
        "rouge_l_recall_mean": sum(recall) / len(recall),
        "rouge_l_f": [score.f1 for score in scores],
    }


def mia_signals(inputs: Data, params: Data) -> Data:
    documents = inputs["documents"]
    texts = [document["text"] for document in documents]
    logits = pad_sequence([torch.tensor(document["logits"]) for document in documents], batch_first=True)
    labels = pad_sequence(
        [torch.tensor(document["ids"]) for document in documents], batch_first=True, padding_value=IGNORED
    )
    scores, mask = signals.label_log_probabilities(logits, labels)
    # Released: no smallest variance, and no token at all of a text of fewer than 1/k tokens.
    standardised, _ = signals.standardised_label_scores(logits, labels, smallest_variance=0.0)
    found = rwku.exposure(scores, standardised, mask, texts, fewest=1)
    per_document = {
        "loss": signals.mean_log_probabilities(scores, mask),
        "zlib": signals.zlib_scores(scores, mask, texts),
    }
    for ratio in params["ratios"]:
        per_document[f"mink_{ratio}"] = signals.min_k_scores(scores, mask, ratio, fewest=0)
        per_document[f"mink++_{ratio}"] = signals.min_k_scores(standardised, mask, ratio, fewest=0)
    return {
        "returned": [found.loss, found.zlib, found.min_k],
        "per_document": {name: values.tolist() for name, values in per_document.items()},
    }


def fluency_and_f1(inputs: Data, params: Data) -> Data:
    per_text = [fluency(text.split(), params["ns"], params["weights"]) for text in inputs["texts"]]
    f1 = [rwku.token_f1(item["prediction"], item["references"]) for item in inputs["qa"]]
    return {
        "entropy": sum(per_text) / len(per_text),
        "entropy_per_text": per_text,
        "f1": sum(f1) / len(f1),
        "f1_per_item": f1,
    }


FUNCTIONS = {
    "rouge_l_recall": rouge_l_recall,
    "mia_signals": mia_signals,
    "fluency_and_f1": fluency_and_f1,
}
