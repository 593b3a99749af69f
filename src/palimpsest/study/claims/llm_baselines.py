"""Measurements for the claims of the baselines of language unlearning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from palimpsest.audit.answer_quality import is_refusal
from palimpsest.core.errors import InvalidRecords, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Records
from palimpsest.forget import forget
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE
from palimpsest.forget.language.rmu import block_states
from palimpsest.parts.tokens import token_counts
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.tasks.language import Language

LONG = 20
"""Epochs of the claims about collapse."""
ASCENT_RATE = 1e-3
"""Learning rate of ascent and of NPO beside it."""
RATE = 1e-3
"""Learning rate of everything else."""
REFUSAL = "I don't know."
SCALES = (0.0, 1.0, 2.0, 5.0)
"""Of task vectors and WHP, in rising order."""
STRENGTHS = (0.0, 0.3, 1.0, 3.0)
"""Of the noise in ECO's embeddings."""
MOST = 150
"""Questions that are asked."""


def _task(setting: Setting) -> Language:
    if not isinstance(setting.task, Language):
        raise MissingNeed(f"These claims are about language models, not {setting.task.name}.")
    return setting.task


def _retain(setting: Setting) -> Records:
    if setting.split.retain is None:
        raise MissingNeed("These claims look at retained records.")
    return setting.split.retain


def _run(setting: Setting, name: str, **settings: Any) -> nn.Module:
    return forget(setting.original, setting.split, name, setting.task, runtime=setting.runtime, **settings)


def _asked(records: Records) -> list[dict[str, Any]]:
    """The first questions of some records."""
    items = [item for item in records if isinstance(item.get("question"), str)][:MOST]
    if not items:
        raise InvalidRecords("The claim needs records that ask a question.")
    return items


def _share(
    setting: Setting, model: nn.Module, records: Records, holds: Callable[[str, dict[str, Any]], bool]
) -> float:
    """Share of the questions whose greedy answer has a property."""
    items = _asked(records)
    made = _task(setting).generate(model, [str(item["question"]) for item in items], max_new_tokens=24)
    return sum(holds(answer[0], item) for answer, item in zip(made, items, strict=True)) / len(items)


def exact(setting: Setting, model: nn.Module, records: Records) -> float:
    """Share of questions answered word by word."""
    return _share(setting, model, records, lambda text, item: text.strip() == str(item["answer"]).strip())


@torch.no_grad()
def _token_loss(setting: Setting, model: nn.Module, records: Records) -> float:
    """Mean loss over all answer tokens."""
    total, count, task = 0.0, 0, _task(setting)
    with evaluating(model):
        for batch in setting.runtime.batches(records, task, 64):
            total += float(task.token_losses(model, batch).sum())
            count += int(token_counts(batch["labels"]).sum())
    return total / count


@torch.no_grad()
def _probability(setting: Setting, model: nn.Module, records: Records) -> float:
    """Mean over records of the probability per token of the answer."""
    task, found = _task(setting), list[torch.Tensor]()
    with evaluating(model):
        for batch in setting.runtime.batches(records, task, 64):
            found.append((-task.loss_per_example(model, batch)).exp())
    return float(torch.cat(found).mean())


@measurement("llm-baselines.ascent-retained")
def ascent_retained(setting: Setting) -> float:
    """Exact answers on retained questions after twenty epochs of gradient ascent."""
    model = _run(setting, "grad-ascent", epochs=LONG, lr=ASCENT_RATE, warmup=0.0)
    return exact(setting, model, _retain(setting))


@measurement("llm-baselines.npo-forgotten")
def npo_forgotten(setting: Setting) -> float:
    """Exact answers on forget questions after twenty epochs of NPO without retain term."""
    return exact(setting, _npo(setting, "none"), setting.split.forget)


@measurement("llm-baselines.npo-gain")
def npo_gain(setting: Setting) -> float:
    """Exact answers on retained questions after NPO without retain term minus after ascent, at the same rate."""
    return exact(setting, _npo(setting, "none"), _retain(setting)) - ascent_retained(setting)


@measurement("llm-baselines.retain-term-gain")
def retain_term_gain(setting: Setting) -> float:
    """The same after NPO with the retain term minus without."""
    kept = _retain(setting)
    return exact(setting, _npo(setting, "nll"), kept) - exact(setting, _npo(setting, "none"), kept)


def _npo(setting: Setting, retain: str) -> nn.Module:
    return _run(setting, "npo", epochs=LONG, lr=ASCENT_RATE, warmup=0.0, retain=retain)


def _refusals(setting: Setting, name: str, **settings: Any) -> float:
    model = _run(setting, name, lr=RATE, warmup=0.0, refusals=[REFUSAL], **settings)
    return _share(setting, model, setting.split.forget, lambda text, _: is_refusal(text))


@measurement("llm-baselines.idk-nll-refusals")
def idk_nll_refusals(setting: Setting) -> float:
    """Refusals to forget questions after ten epochs of IdkNLL with a single wording."""
    return _refusals(setting, "idk-nll", epochs=10)


@measurement("llm-baselines.idk-dpo-refusals")
def idk_dpo_refusals(setting: Setting) -> float:
    """Refusals to forget questions after twenty epochs of IdkDPO with a single wording."""
    return _refusals(setting, "idk-dpo", epochs=20)


@measurement("llm-baselines.altpo-alternates")
def altpo_alternates(setting: Setting) -> float:
    """Share of forget questions with alternates that are answered with the alternate, after twenty epochs of AltPO."""
    model = _run(setting, "altpo", lr=RATE, warmup=0.0, epochs=20, alternates="given", count=1, retain="nll")
    having = [bool(item.get("perturbed_answer")) for item in setting.split.forget]
    records = setting.split.forget.select(torch.tensor(having).numpy())
    return _share(
        setting, model, records, lambda text, item: text.strip() == str(item["perturbed_answer"][0]).strip()
    )


def _factor(setting: Setting, name: str, **settings: Any) -> float:
    model = _run(setting, name, lr=RATE, warmup=0.0, **settings)
    before = _probability(setting, setting.original, setting.split.forget)
    return before / _probability(setting, model, setting.split.forget)


@measurement("llm-baselines.undial-factor")
def undial_factor(setting: Setting) -> float:
    """By what factor twenty epochs of UNDIAL lower the probability per token of forget answers."""
    return _factor(setting, "undial", epochs=20)


@measurement("llm-baselines.ce-u-factor")
def ce_u_factor(setting: Setting) -> float:
    """The same for ten epochs of CE-U."""
    return _factor(setting, "ce-u", epochs=10)


@measurement("llm-baselines.pdu-distance")
def pdu_distance(setting: Setting) -> float:
    """|retain loss - bound| / bound after thirty epochs of PDU, with twice the original's loss as the bound."""
    model = _run(setting, "pdu", lr=RATE, warmup=0.0, epochs=30, slack=2.0, dual_step=5.0, dual_warmup=2)
    bound = 2 * _token_loss(setting, setting.original, _retain(setting))
    return abs(_token_loss(setting, model, _retain(setting)) - bound) / bound


def _steered(setting: Setting) -> nn.Module:
    """The model after RMU at its first block."""
    return _run(
        setting, "rmu", layer=0, steering=4.0, relative=True, alpha=10.0, lr=3e-3, epochs=40, weight_decay=0.0
    )


@measurement("llm-baselines.rmu-distance")
def rmu_distance(setting: Setting) -> float:
    """Squared distance of forget states to the control vector at the last step over that at the first."""
    history = cast(Sequence[dict[str, float]], getattr(_steered(setting), HISTORY_ATTRIBUTE))
    return history[-1]["forget_loss"] / history[0]["forget_loss"]


@measurement("llm-baselines.rmu-retained")
def rmu_retained(setting: Setting) -> float:
    """Way of retained hidden states over that of forget ones, mean length."""
    steered = _steered(setting)
    kept, gone = (_way(setting, steered, part) for part in (_retain(setting), setting.split.forget))
    return kept / gone


@torch.no_grad()
def _way(setting: Setting, steered: nn.Module, records: Records) -> float:
    """Mean length of the way of hidden states that leave the first block."""
    ways: list[torch.Tensor] = []
    for batch in setting.runtime.batches(records, setting.task, 64):
        mask = batch["attention_mask"].bool()
        before, after = (
            block_states(model, _task(setting), batch, 0)[mask] for model in (setting.original, steered)
        )
        ways.append((after - before).norm(dim=-1))
    return float(torch.cat(ways).mean())


def _rise(setting: Setting, models: Sequence[nn.Module]) -> float:
    """Largest rise of exact answers on forget questions from one model to the next."""
    found = [exact(setting, model, setting.split.forget) for model in models]
    return max(after - before for before, after in pairwise(found))


@measurement("llm-baselines.task-vector-rise")
def task_vector_rise(setting: Setting) -> float:
    """Largest rise of exact forget answers between scales of a task vector in rising order."""
    settings = {"epochs": 10, "lr": RATE, "warmup": 0.0}
    return _rise(setting, [_run(setting, "task-vector", scale=scale, **settings) for scale in SCALES])


@measurement("llm-baselines.whp-rise")
def whp_rise(setting: Setting) -> float:
    """The same for WHP."""
    settings = {"epochs": 10, "lr": RATE, "warmup": 0.0}
    return _rise(setting, [_run(setting, "whp", scale=scale, **settings) for scale in SCALES])


@measurement("llm-baselines.eco-rise")
def eco_rise(setting: Setting) -> float:
    """The same for ECO and the strength of its noise on eight coordinates."""
    return _rise(setting, [_run(setting, "eco", dims=8, strength=strength) for strength in STRENGTHS])


@measurement("llm-baselines.eco-forgotten")
def eco_forgotten(setting: Setting) -> float:
    """Exact forget answers under ECO's strongest noise."""
    model = _run(setting, "eco", dims=8, strength=STRENGTHS[-1])
    return exact(setting, model, setting.split.forget)


@measurement("llm-baselines.eco-retained")
def eco_retained(setting: Setting) -> float:
    """Share of retained questions that are answered under the strongest noise as they are without."""
    task, kept = _task(setting), [str(item["question"]) for item in _asked(_retain(setting))]
    model = _run(setting, "eco", dims=8, strength=STRENGTHS[-1])
    pair = [task.generate(each, kept, max_new_tokens=24) for each in (setting.original, model)]
    return sum(one == two for one, two in zip(*pair, strict=True)) / len(kept)
