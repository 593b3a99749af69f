"""TOFU's metrics and six membership attacks on one model: shared passes against every metric on its own.

The model has learnt a generated world, as TOFU's have learnt its authors. On its own, a metric makes every pass
that its definition needs, with batches as large; gradient norms are taken record by record, as they are elsewhere.
Reference values of the retrained model are known beforehand on either side.

Run: python benchmarks/tofu_suite.py [--world tiny] [--write]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from speed_page import table, write_section
from torch import nn

import palimpsest as pal
from palimpsest.audit.answers import rouge_score
from palimpsest.audit.language.asked import Question
from palimpsest.audit.language.token_signals import gradient_scores
from palimpsest.audit.membership import language_signals as signals
from palimpsest.audit.membership.privacy_leak import privacy_auc, privacy_signals
from palimpsest.audit.memorisation import exact_memorisation, extraction_strength
from palimpsest.audit.truth_ratio import (
    answer_probabilities,
    closer_to_one,
    forget_quality,
    option_probabilities,
    truth_preferred,
    truth_probabilities,
    truth_ratios,
)
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.intervals import auc
from palimpsest.data import load_data
from palimpsest.models.learnt_worlds import LEARNT_WORLDS
from palimpsest.suites.tofu_audit import answered, question_sets
from palimpsest.suites.tofu_scores import (
    OPTION_SETS,
    UTILITY_SETS,
    harmonic_mean,
    model_utility,
    ratios_by_item,
    set_scores,
)
from palimpsest.tasks.language import Language
from palimpsest.tasks.scoring import observed_tokens

NEW_TOKENS = 32
K = 0.4
BATCH = 64
REPETITIONS = 3
SETS = ("forget", *UTILITY_SETS)
ATTACKS = ("loss", "zlib", "reference", "min_k", "min_k++", "gradient_norm")
Values = dict[str, float]


@dataclass
class Asked:
    """Questions of every set, and the models: the one that is measured, and a retrained one.

    Attributes:
        task: Language.
        model: To measure.
        retrained: Whose truth ratios and areas are known (they are kept with it, as elsewhere).
        sets: Questions by set, "holdout" among them.
        counts: Times that a set was gone through, sequences scored and answers generated, on the model's own.
    """

    task: Language
    model: nn.Module
    retrained: nn.Module
    sets: dict[str, list[Question]]
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def count(self, sequences: int, generated: int = 0, passes: int = 1) -> None:
        """Note what a pass over a set cost."""
        for key, number in (("passes", passes), ("sequences", sequences), ("generated", generated)):
            self.counts[key] = self.counts.get(key, 0) + number


# Shared: what Palimpsest does.


def shared(asked: Asked, evidence: Evidence, ratios: dict[str, float]) -> Values:
    """One pass that scores and one that generates per set, and one that observes for the attacks."""
    found = {
        name: answered(evidence, UNLEARNED, asked.sets[name], NEW_TOKENS, name not in OPTION_SETS)
        for name in SETS
    }
    result: Values = {}
    sets = {name: set_scores(name, item.losses) for name, item in found.items()}
    for name, item in sets.items():
        result |= {
            f"{name} probability": item.probability,
            f"{name} rouge": item.rouge,
            f"{name} truth ratio": item.truth_ratio,
        }
    result["model utility"] = model_utility(sets)
    forget = found["forget"]
    result["forget quality"] = forget_quality(ratios_by_item(forget.losses), ratios).p
    result["paraphrase probability"] = float(answer_probabilities(forget.paraphrase).mean())
    result["truth probability"] = float(
        truth_probabilities(forget.losses.paraphrase, forget.losses.wrong).mean()
    )
    mask = signals.without_last(forget.own.mask)
    result["exact memorisation"] = float(exact_memorisation(forget.own.right, mask).mean())
    result["extraction strength"] = float(extraction_strength(forget.own.right, mask).mean())
    for name in SETS:
        generated = int((~(found[name].own.right | ~found[name].own.mask).all(1)).sum())
        sequences = sum(2 + len(question.wrong) for question in asked.sets[name])
        asked.count(sequences, generated, passes=1 + bool(generated))
    sides = {name: observed(asked, asked.model, name) for name in ("forget", "holdout")}
    reference = {name: observed(asked, asked.retrained, name, count=False) for name in sides}
    result["privacy leak"] = leak_of(sides["forget"], sides["holdout"])
    for attack in ATTACKS:
        members, others = (
            attack_scores(attack, asked, name, sides[name], reference[name]) for name in ("forget", "holdout")
        )
        result[f"attack {attack}"] = auc(members, others)
    return result


def leak_of(forget: dict[str, torch.Tensor], holdout: dict[str, torch.Tensor]) -> float:
    """The area under the curve that PrivLeak is made of."""
    mine, theirs = (
        privacy_signals(side["log_probability"], side["mask"].bool(), K) for side in (forget, holdout)
    )
    return privacy_auc(mine, theirs)


def observed(asked: Asked, model: nn.Module, name: str, count: bool = True) -> dict[str, torch.Tensor]:
    """Per-token measurements of a set's answers, from one pass."""
    pieces: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for batch in batches(asked, name):
            pieces.append(observed_tokens(asked.task.logits(model, batch).float(), batch["labels"]))
    if count:
        asked.count(len(asked.sets[name]))
    width = max(piece["mask"].shape[1] for piece in pieces)
    return {
        key: torch.cat([nn.functional.pad(piece[key], (0, width - piece[key].shape[1])) for piece in pieces])
        for key in pieces[0]
    }


def batches(asked: Asked, name: str, answers: Sequence[str] | None = None):
    """A set's questions with their own or other answers, in batches."""
    questions = asked.sets[name]
    texts = [question.answer for question in questions] if answers is None else answers
    for start in range(0, len(questions), BATCH):
        chunk = slice(start, start + BATCH)
        items = [
            {"question": q.question, "answer": text}
            for q, text in zip(questions[chunk], texts[chunk], strict=True)
        ]
        yield asked.task.collate(items)


def attack_scores(
    attack: str, asked: Asked, name: str, own: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> np.ndarray:
    """Scores of a side; high means member."""
    log_p, mask = own["log_probability"], own["mask"].bool()
    if attack == "loss":
        found = signals.mean_log_probabilities(log_p, mask)
    elif attack == "zlib":
        found = signals.zlib_scores(log_p, mask, [question.answer for question in asked.sets[name]])
    elif attack == "reference":
        found = signals.reference_scores(log_p, reference["log_probability"], mask)
    elif attack == "min_k":
        found = signals.min_k_scores(log_p, mask)
    elif attack == "min_k++":
        deviation = own["deviation"].square().clamp(min=signals.SMALLEST_VARIANCE).sqrt()
        found = signals.min_k_scores(((log_p - own["mean"]) / deviation).masked_fill(~mask, 0.0), mask)
    else:
        return gradient_norms(asked, name)
    return found.numpy()


def gradient_norms(asked: Asked, name: str) -> np.ndarray:
    """The gradient norm of every answer, one backward pass for a batch."""
    found: list[torch.Tensor] = []
    for batch in batches(asked, name):
        scores = gradient_scores(asked.task, asked.model, batch, list(asked.model.parameters()))
        assert scores is not None
        found.append(scores)
    asked.count(len(asked.sets[name]))
    return torch.cat(found).numpy()


# Alone: every metric makes the passes that it needs.


def losses_of(asked: Asked, name: str, answers: Sequence[str] | None = None) -> np.ndarray:
    """Mean token losses of one answer per question: prompt and answer are read together."""
    found: list[np.ndarray] = []
    with torch.no_grad():
        for batch in batches(asked, name, answers):
            found.append(asked.task.loss_per_example(asked.model, batch).double().numpy())
    asked.count(len(asked.sets[name]))
    return np.concatenate(found)


def wrong_losses(asked: Asked, name: str) -> np.ndarray:
    questions = asked.sets[name]
    return np.stack(
        [losses_of(asked, name, [q.wrong[at] for q in questions]) for at in range(len(questions[0].wrong))], 1
    )


def right_losses(asked: Asked, name: str) -> np.ndarray:
    """Of what wrong answers are compared with."""
    if name in OPTION_SETS:
        return losses_of(asked, name)
    return losses_of(asked, name, [question.paraphrase for question in asked.sets[name]])


def alone_ratios(asked: Asked, name: str) -> np.ndarray:
    return truth_ratios(right_losses(asked, name), wrong_losses(asked, name))


def alone_probability(asked: Asked, name: str) -> float:
    if name in OPTION_SETS:
        return float(option_probabilities(losses_of(asked, name), wrong_losses(asked, name)).mean())
    return float(answer_probabilities(losses_of(asked, name)).mean())


def alone_rouge(asked: Asked, name: str) -> float:
    questions = asked.sets[name]
    texts = asked.task.generate(asked.model, [q.question for q in questions], max_new_tokens=NEW_TOKENS)
    asked.count(0, len(questions))
    found = rouge_score([text[0] for text in texts], [q.answer for q in questions], stem=True)
    return float(np.mean([item.recall for item in found]))


def alone_truth(asked: Asked, name: str) -> float:
    ratios = alone_ratios(asked, name)
    return closer_to_one(ratios) if name == "forget" else truth_preferred(ratios)


def alone_hits(asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    seen = observed(asked, asked.model, "forget")
    return seen["right"].bool(), signals.without_last(seen["mask"].bool())


def alone_gradient_norms(asked: Asked, name: str) -> np.ndarray:
    """The gradient norm of every answer, one backward pass each, as benchmarks elsewhere do it."""
    found: list[float] = []
    for question in asked.sets[name]:
        batch = asked.task.collate([{"question": question.question, "answer": question.answer}])
        loss = asked.task.loss_per_example(asked.model, batch).mean()
        found.append(signals.gradient_norm(loss, asked.model.parameters()))
    asked.count(len(found))
    return np.array(found)


def alone(asked: Asked, ratios: dict[str, float]) -> Values:
    """Every metric on its own."""
    result: Values = {}
    for name in SETS:
        result[f"{name} probability"] = alone_probability(asked, name)
        result[f"{name} rouge"] = alone_rouge(asked, name)
        result[f"{name} truth ratio"] = alone_truth(asked, name)
    nine = [
        measure(asked, name)
        for name in UTILITY_SETS
        for measure in (alone_probability, alone_rouge, alone_truth)
    ]
    result["model utility"] = harmonic_mean(nine)
    facts = [question.fact for question in asked.sets["forget"]]
    own = dict(zip(facts, alone_ratios(asked, "forget").tolist(), strict=True))
    result["forget quality"] = forget_quality(own, ratios).p
    result["paraphrase probability"] = float(answer_probabilities(right_losses(asked, "forget")).mean())
    result["truth probability"] = float(
        truth_probabilities(right_losses(asked, "forget"), wrong_losses(asked, "forget")).mean()
    )
    result["exact memorisation"] = float(exact_memorisation(*alone_hits(asked)).mean())
    result["extraction strength"] = float(extraction_strength(*alone_hits(asked)).mean())
    sides = [observed(asked, asked.model, name) for name in ("forget", "holdout")]
    result["privacy leak"] = leak_of(*sides)
    for attack in ATTACKS:
        both: list[np.ndarray] = []
        for name in ("forget", "holdout"):
            needed = {} if attack == "gradient_norm" else observed(asked, asked.model, name)
            other = observed(asked, asked.retrained, name) if attack == "reference" else {}
            both.append(
                alone_gradient_norms(asked, name)
                if not needed
                else attack_scores(attack, asked, name, needed, other)
            )
        result[f"attack {attack}"] = auc(*both)
    return result


def learnt(name: str) -> tuple[Language, pal.ForgetSplit, nn.Module, nn.Module]:
    """A world, the model that has learnt it, and one without the forget records."""
    world = LEARNT_WORLDS[name]
    records = load_data("people", **world.data)
    parts = pal.split(records, pal.by_column("fold", 0))
    assert parts.retain is not None
    task = Language(tokenizer=world.tokenizer(records))
    model, retrained = (
        pal.train(world.model(len(task.encoder)), kept, task=task, recipe=world.training)
        for kept in (parts.train, parts.retain)
    )
    return task, parts, model, retrained


def prepared(
    task: Language, parts: pal.ForgetSplit, model: nn.Module, retrained: nn.Module
) -> tuple[Asked, Evidence, dict[str, float]]:
    """Questions by set, and the truth ratios of the retrained model."""
    assert parts.holdout is not None
    evidence = Evidence(model, parts, task)
    held = Evidence(model, pal.ForgetSplit(parts.holdout, parts.retain), task)
    sets = {**question_sets(evidence, 300), "holdout": question_sets(held, 300)["forget"]}
    other = answered(Evidence(retrained, parts, task), UNLEARNED, sets["forget"], NEW_TOKENS)
    return Asked(task, model, retrained, sets), evidence, ratios_by_item(other.losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=sorted(LEARNT_WORLDS), default="tiny")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/speed.md")
    settings = parser.parse_args()
    text = compare(*prepared(*learnt(settings.world)))
    print(text)
    if settings.write:
        write_section("tofu-suite", text)


def compare(asked: Asked, evidence: Evidence, ratios: dict[str, float]) -> str:
    """Measure both ways, the best of several times; passes and seconds, and the largest difference of a value."""
    taken: dict[str, list[float]] = {"shared": [], "alone": []}
    counts: dict[str, dict[str, int]] = {}
    found: dict[str, Values] = {}
    for _ in range(1 + REPETITIONS):  # the first is not counted: libraries set themselves up in it
        for name, seconds in taken.items():
            asked.counts = {}
            fresh = Evidence(asked.model, evidence.split, asked.task)  # remembers nothing of the last time
            start = time.process_time()
            found[name] = shared(asked, fresh, ratios) if name == "shared" else alone(asked, ratios)
            seconds.append(time.process_time() - start)
            counts[name] = asked.counts
    quick, slow = (min(seconds[1:]) for seconds in taken.values())
    few, many = counts["shared"], counts["alone"]
    mine, theirs = found["shared"], found["alone"]
    sizes = ", ".join(f"{name} {len(questions)}" for name, questions in asked.sets.items())
    rows = [
        ["shared passes", *(str(number) for number in few.values()), f"{quick:.2f}"],
        ["metric by metric", *(str(number) for number in many.values()), f"{slow:.2f}"],
        ["ratio", *(f"{many[name] / few[name]:.1f}" for name in few), f"{slow / quick:.1f}"],
    ]
    assert mine.keys() == theirs.keys()
    worst = max(mine, key=lambda name: abs(mine[name] - theirs[name]))
    np.testing.assert_allclose([mine[name] for name in theirs], list(theirs.values()), rtol=1e-4, atol=1e-5)
    told = f"{len(mine)} metrics of one model ({sizes} questions)."
    differs = f"Largest difference of a value: {abs(mine[worst] - theirs[worst]):.2g} ({worst})."
    heads = ["how", "passes over a set", "sequences scored", "answers generated", "processor seconds"]
    return f"{told}\n\n{table(heads, rows)}\n\n{differs}"


if __name__ == "__main__":
    main()
