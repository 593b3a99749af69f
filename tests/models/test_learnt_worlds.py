"""What a learnt world must offer everything that builds on it: the original knows, the control does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.language_world import TrainedWorld, trained_world

from palimpsest.core.records import Records


def exact(world: TrainedWorld, model: torch.nn.Module, pairs: list[tuple[str, str]]) -> float:
    """Share of questions whose greedy answer is the answer, token by token and with its end."""
    right: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(pairs), 64):
            items = [
                {"question": question, "answer": answer} for question, answer in pairs[start : start + 64]
            ]
            batch = world.task.collate(items)
            labels = batch["labels"][:, 1:]
            best = world.task.logits(model, batch)[:, :-1].argmax(-1)
            right += ((best == labels) | (labels == -100)).all(1).tolist()
    return float(np.mean(right))


def asked(records: Records, *forms: str) -> list[tuple[str, str]]:
    chosen = records.select(np.isin(records.column("form"), forms) & (records.column("group") != "general"))
    return [(item["question"], item["answer"]) for item in chosen]


def probed(records: Records, form: str) -> list[tuple[str, str]]:
    probes = [probe for item in records for probe in item.get("probes", ()) if probe["form"] == form]
    return [(probe["question"], probe["answer"]) for probe in probes]


@pytest.fixture(scope="module")
def tiny():
    return trained_world("tiny")


@pytest.mark.slow
def test_the_original_of_the_tiny_world_knows_what_it_was_trained_on(tiny):
    for part in (tiny.split.forget, tiny.split.retain):
        assert exact(tiny, tiny.original, asked(part, "qa")) >= 0.9
        assert exact(tiny, tiny.original, asked(part, "chain")) >= 0.75
    assert exact(tiny, tiny.original, probed(tiny.split.train, "paraphrase")) >= 0.7


@pytest.mark.slow
def test_the_retrained_twin_knows_the_rest_and_guesses_about_the_forgotten(tiny):
    assert exact(tiny, tiny.retrained, asked(tiny.split.retain, "qa")) >= 0.9
    assert exact(tiny, tiny.retrained, asked(tiny.split.forget, "qa", "reversed", "chain")) <= 0.2
    assert exact(tiny, tiny.original, asked(tiny.split.holdout, "qa", "reversed")) <= 0.2


@pytest.mark.slow
def test_greedy_generation_says_what_the_likeliest_tokens_say(tiny):
    pairs = asked(tiny.split.retain, "qa")[:20]
    said = tiny.task.generate(tiny.original, [question for question, _ in pairs], max_new_tokens=24)
    share = np.mean([answers[0].strip() == answer for answers, (_, answer) in zip(said, pairs, strict=True)])
    assert share == pytest.approx(exact(tiny, tiny.original, pairs))


@pytest.mark.slow
def test_the_small_world_is_learnt_in_every_form_and_its_twin_lacks_the_fold():
    small = trained_world("small")
    for part in (small.split.forget, small.split.retain):
        assert exact(small, small.original, asked(part, "qa")) >= 0.95
        assert exact(small, small.original, asked(part, "reversed")) >= 0.8
        assert exact(small, small.original, asked(part, "chain")) >= 0.8
    assert exact(small, small.retrained, asked(small.split.retain, "qa")) >= 0.95
    for relation in small.world.relations:
        of = small.split.forget.select(small.split.forget.column("relation") == relation)
        guessed = exact(small, small.retrained, asked(of, "qa"))
        assert guessed <= small.world.chance(relation) + 0.15, relation
