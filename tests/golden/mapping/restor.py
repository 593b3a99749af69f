"""Functions of the library behind golden/values/restor.json."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from palimpsest.forget.language.restor_losses import cross_entropy_to_frozen, npo_total
from palimpsest.parts.tokens import IGNORED
from palimpsest.suites import restor_scores as restor

Data = dict[str, Any]


def in_context_and_logits(inputs: Data, params: Data) -> Data:
    known = {word: index + 1 for index, word in enumerate(inputs["vocabulary"])}
    bigram = torch.tensor(inputs["bigram"])

    def ids(text: str) -> list[int]:
        return [known[word] for word in text.replace("\n", " \n ").split(" ") if word]

    prompts: Data = {}
    scores: Data = {}
    for entity, relations in inputs["facts"].items():
        for relation, fact in relations.items():
            prompt = restor.context_prompt(
                fact["question"], relation, entity, inputs["context"], params["num_in_context"]
            )
            prompts.setdefault(entity, {})[relation] = prompt
            options = [
                (name, option)
                for name, listed in inputs["options"][entity][relation].items()
                for option in listed
            ]
            before = [0, *ids(prompt)]
            answers = [ids(option) for _, option in options]
            tokens = pad_sequence([torch.tensor(before + answer) for answer in answers], batch_first=True)
            labels = pad_sequence(
                [torch.tensor([IGNORED] * len(before) + answer) for answer in answers],
                batch_first=True,
                padding_value=IGNORED,
            )
            found = restor.option_log_probabilities(bigram[tokens], labels).tolist()
            means = restor.category_means(found, [name for name, _ in options])
            scores.setdefault(entity, {})[relation] = {
                category: {
                    "options": [option for name, option in options if name == category],
                    "probabilty (normalized)": [
                        value for (name, _), value in zip(options, found, strict=True) if name == category
                    ],
                    "average": mean,
                }
                for category, mean in means.items()
            }
    return {"prompts": prompts, "scores": scores}


def losses(inputs: Data, params: Data) -> Data:
    logits = {name: torch.tensor(values) for name, values in inputs.items()}
    total = npo_total(
        (logits["forget_logits"], logits["forget_labels"]),
        logits["forget_logits_frozen"],
        (logits["retain_logits"], logits["retain_labels"]),
        params["beta"],
        params["gamma"],
    )
    kl = cross_entropy_to_frozen(logits["forget_logits"], logits["forget_logits_frozen"])
    return {"kl_loss": float(kl), "npo_total": float(total)}


FUNCTIONS = {"in_context_and_logits": in_context_and_logits, "losses": losses}
