"""Measurements for the claims of GUARD."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.core.unlearner import Unlearner
from palimpsest.forget import forget
from palimpsest.forget.language.guard import Guard
from palimpsest.forget.language.guard_phrases import plain
from palimpsest.forget.language.guarded_model import GuardedModel
from palimpsest.parts.beam_search import Search, beam_search
from palimpsest.parts.constrained import ForbiddenPhrases
from palimpsest.study.claims.answering import NEW_TOKENS, greedy, language, plainly_asked, retained
from palimpsest.study.claims.measuring import Setting, measurement

WIDTH = 5
SHAPES = {
    "birth": re.compile(r"\d{1,2} [A-Z][a-z]+ \d{4}|\d{2}/\d{2}/\d{4}"),
    "phone": re.compile(r"555 \d{4}"),
    "city": re.compile(r"[A-Z][a-z]+(?: (?:[A-Z][a-z]+))?"),
}
"""How the world writes the values of a relation."""


@lru_cache(maxsize=3)
def _guard(setting: Setting, soft: str = "reject") -> GuardedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # choices in a question leave no phrase of the answer
        method = cast(Unlearner, Guard(beam_width=WIDTH, soft=soft))  # pyright: ignore[reportArgumentType]
        found = forget(setting.original, setting.split, method, setting.task, runtime=setting.runtime)
    assert isinstance(found, GuardedModel)
    return found


def _asked(records: Records, *forms: str) -> list[dict[str, Any]]:
    pairs = zip(records, records.column("form"), strict=True)
    return [item for item, form in pairs if item.get("question") and (not forms or form in forms)]


def _questions(items: Sequence[dict[str, Any]]) -> list[str]:
    return [str(item["question"]) for item in items]


def _answers(setting: Setting, model: nn.Module, items: Sequence[dict[str, Any]]) -> list[str]:
    found = language(setting).generate(model, _questions(items), max_new_tokens=NEW_TOKENS)
    return [row[0] for row in found]


def _share(found: Sequence[bool]) -> float:
    if not found:
        raise InvalidRecords("The claim needs records that the request does not have.")
    return sum(found) / len(found)


def _restricted(setting: Setting) -> list[dict[str, Any]]:
    """Forget questions of every form that take the restricted path."""
    items = _asked(setting.split.forget)
    return [item for item, one in zip(items, _guard(setting).guards(_questions(items)), strict=True) if one]


@measurement("guard.leaks")
def leaks(setting: Setting) -> float:
    """Number of restricted answers that hold a forbidden phrase as tokens."""
    guard, items, task = _guard(setting), _restricted(setting), language(setting)
    count = 0
    for item in items:
        prompt = torch.tensor([task.prompt(str(item["question"]))], device=guard.device)
        written = guard.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS)
        machine = guard.forbidden(str(item["question"])).machine
        count += machine.leaks(written[0, prompt.shape[1] :].tolist())
    return float(count)


@measurement("guard.exact-before")
def exact_before(setting: Setting) -> float:
    """Share of plain forget questions whose answer the original says."""
    return _exact(setting, setting.original)


@measurement("guard.exact-after")
def exact_after(setting: Setting) -> float:
    """The same under the guard."""
    return _exact(setting, _guard(setting))


def _exact(setting: Setting, model: nn.Module) -> float:
    items = list(plainly_asked(setting.split.forget))
    pairs = zip(items, _answers(setting, model, items), strict=True)
    return _share([plain(str(item["answer"])) in plain(text) for item, text in pairs])


@measurement("guard.rouge-before")
def rouge_before(setting: Setting) -> float:
    """Mean ROUGE-L F1 of the original's answers to plain forget questions."""
    return _rouge(setting, setting.original)


@measurement("guard.rouge-after")
def rouge_after(setting: Setting) -> float:
    """The same under the guard."""
    return _rouge(setting, _guard(setting))


def _rouge(setting: Setting, model: nn.Module) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"], use_stemmer=True)
    items = list(plainly_asked(setting.split.forget))
    pairs = zip(items, _answers(setting, model, items), strict=True)
    scores = [float(scorer.score(str(item["answer"]), text)["rougeL"].fmeasure) for item, text in pairs]
    return sum(scores) / len(scores)


@measurement("guard.same-answers")
def same_answers(setting: Setting) -> float:
    """Share of plain retained questions that are answered as by the original."""
    asked = plainly_asked(retained(setting))
    one, two = (greedy(setting, model, asked) for model in (setting.original, _guard(setting)))
    return _share([a == b for a, b in zip(one, two, strict=True)])


@measurement("guard.weights-changed")
def weights_changed(setting: Setting) -> float:
    """Number of tensors inside the guard that differ from the original's in any bit."""
    inner = _guard(setting).inner.state_dict()
    return float(
        sum(not torch.equal(inner[name], own) for name, own in setting.original.state_dict().items())
    )


def _unseen(records: Records) -> list[dict[str, Any]]:
    """Questions in wordings that neither model nor classifier was trained on."""
    probes = [probe for item in records for probe in item.get("probes") or ()]
    return [probe for probe in probes if probe["form"] == "unseen-wording"]


@measurement("guard.unseen-recall")
def unseen_recall(setting: Setting) -> float:
    """Share of forget questions in unseen wordings that are guarded."""
    return _share(_guard(setting).guards(_questions(_unseen(setting.split.forget))))


@measurement("guard.unseen-false-positives")
def unseen_false_positives(setting: Setting) -> float:
    """Share of retained questions in unseen wordings that are guarded."""
    return _share(_guard(setting).guards(_questions(_unseen(retained(setting)))))


@measurement("guard.nameless-recall-gain")
def nameless_recall_gain(setting: Setting) -> float:
    """Recall on forget questions without the name, minus that of looking for the names."""
    subjects: list[str] = setting.split.forget.column("subject").tolist()
    names = set(subjects) - {""}
    asked = _questions(_asked(setting.split.forget, "reversed"))
    by_name = [any(name in question for name in names) for question in asked]
    return _share(_guard(setting).guards(asked)) - _share(by_name)


@measurement("guard.other-form-hard-only")
def other_form_hard_only(setting: Setting) -> float:
    """Share of guarded questions for a birth date whose answer is the date in another form, without A_sem."""
    return _other_form(setting, "off")


@measurement("guard.other-form")
def other_form(setting: Setting) -> float:
    """The same with both penalties."""
    return _other_form(setting, "reject")


def _other_form(setting: Setting, soft: str) -> float:
    guard = _guard(setting, soft)
    items = [item for item in _asked(setting.split.forget, "qa", "figures") if item["relation"] == "birth"]
    items = [item for item, one in zip(items, guard.guards(_questions(items)), strict=True) if one]
    pairs = zip(items, _answers(setting, guard, items), strict=True)
    return _share([any(plain(form) in plain(text) for form in item["aliases"]) for item, text in pairs])


@measurement("guard.fluency")
def fluency(setting: Setting) -> float:
    """Share of restricted answers to plain questions that are a value of the kind that was asked for."""
    items = _plain_restricted(setting)
    return _fluency(items, _answers(setting, _guard(setting), items))


@measurement("guard.fluency-gain")
def fluency_gain(setting: Setting) -> float:
    """The same minus that of greedy decoding in which tokens that complete a phrase are banned."""
    guard, task, items = _guard(setting), language(setting), _plain_restricted(setting)
    texts: list[str] = []
    for item in items:
        prompt = torch.tensor([task.prompt(str(item["question"]))], device=guard.device)
        banned = ForbiddenPhrases(guard.forbidden(str(item["question"])).machine, prompt.shape[1])
        inner: Any = guard.inner
        written = inner.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False,
            logits_processor=[banned], eos_token_id=task.stops, pad_token_id=task.padding,
        )  # fmt: skip
        texts.append(task.encoder.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return fluency(setting) - _fluency(items, texts)


def _plain_restricted(setting: Setting) -> list[dict[str, Any]]:
    items = list(plainly_asked(setting.split.forget))
    return [item for item, one in zip(items, _guard(setting).guards(_questions(items)), strict=True) if one]


def _fluency(items: Sequence[dict[str, Any]], texts: Sequence[str]) -> float:
    return _share(
        [bool(SHAPES[item["relation"]].fullmatch(text)) for item, text in zip(items, texts, strict=True)]
    )


@measurement("guard.slowdown")
def slowdown(setting: Setting) -> float:
    """Time per token of the restricted search over that of the same search without restriction, embeddings kept."""
    guard, task = _guard(setting), language(setting)
    rows = [task.prompt(question) for question in _questions(_restricted(setting)[:6])]
    prompts = [torch.tensor([row], device=guard.device) for row in rows]
    search = Search(WIDTH, NEW_TOKENS, frozenset(task.stops))

    def restricted() -> int:
        settings = {"max_new_tokens": NEW_TOKENS}
        written = [guard.generate(ids, attention_mask=torch.ones_like(ids), **settings) for ids in prompts]
        return sum(out.shape[1] - ids.shape[1] for out, ids in zip(written, prompts, strict=True))

    def free() -> int:
        found = [beam_search(guard.inner, ids, torch.ones_like(ids), search) for ids in prompts]
        return sum(len(prompt[0].tokens) for one in found for prompt in one)

    restricted()
    pairs = [(_per_token(restricted), _per_token(free)) for _ in range(3)]
    return min(one for one, _ in pairs) / min(two for _, two in pairs)


def _per_token(run: Any) -> float:
    start = time.process_time()
    tokens = run()
    return (time.process_time() - start) / tokens
