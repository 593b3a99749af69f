"""RESTOR on the generated world: forgetting is not restoration."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import palimpsest as pal
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.data import load_data
from palimpsest.models import build_model
from palimpsest.models.learnt_worlds import LEARNT_WORLDS
from palimpsest.parts.reinitialise import fresh_start, starting
from palimpsest.parts.training import TrainingRecipe
from palimpsest.study.recipe import load_recipe
from palimpsest.suites.benchmark import BENCHMARKS
from palimpsest.suites.restor_audit import Restor, facts_of
from palimpsest.tasks.language import Language
from tests.language_world import trained_world

GREEDY = Restor(lines=0, temperature=0, runs=1, new_tokens=10)


@pytest.fixture(scope="module")
def world():
    return trained_world("tiny")


@pytest.fixture(scope="module")
def parts():
    settings = LEARNT_WORLDS["tiny"].data
    return pal.split(load_data("restor-people", **settings), pal.by_column("group", "documents"))


@pytest.fixture(scope="module")
def corrupted(world, parts):
    recipe = TrainingRecipe(epochs=8, lr=1e-3, batch_size=12, optimizer="adamw", clip=1.0)
    return pal.train(world.original, parts.forget, task=world.task, recipe=recipe)


@pytest.fixture(scope="module")
def evidence(world, parts, corrupted):
    few = parts.retain.select(parts.retain.column("form") == "qa").select(range(24))
    small = ForgetSplit(parts.forget, few, parts.test, parts.holdout)
    return Evidence(
        corrupted, small, world.task, Runtime(device="cpu", threads=1), corrupted, [world.original]
    )


def measured(evidence, audit=GREEDY):
    return {item.name: item for item in audit.run(evidence).findings}


def test_documents_replace_the_true_answers_and_nothing_is_restored_without_unlearning(evidence):
    found = measured(evidence)
    assert found["true_rate"].original <= 0.2 and found["planted_rate"].original >= 0.8
    assert found["true_rate"].controls[0] == 1
    assert (found["restoration"].value, found["forgetting"].value) == (0, 0)
    assert found["degradation"].value >= 0.8


def test_undoing_the_change_of_the_weights_restores_everything(world, evidence, corrupted):
    undone = copy.deepcopy(corrupted)
    clean = dict(world.original.named_parameters())
    with torch.no_grad():
        for name, weight in undone.named_parameters():
            weight -= weight - clean[name]
    found = measured(evidence.judging(undone))
    assert found["restoration"].value == 1 and found["forgetting"].value == 1


def test_a_model_that_says_neither_forgets_without_restoring(evidence, corrupted):
    silent = copy.deepcopy(corrupted)
    with torch.no_grad():
        silent.get_output_embeddings().weight.zero_()
    found = measured(evidence.judging(silent))
    assert found["forgetting"].value == 1 and found["restoration"].value == pytest.approx(0, abs=0.1)
    assert found["others_rate"].value == 0


def test_log_probabilities_of_options_are_those_of_a_plain_pass(world, evidence, corrupted):
    found = measured(evidence)
    known = found["true_rate"].n
    asked = [fact.question for fact in facts_of(evidence)]
    items = [{"question": fact.question, "answer": fact.answer} for fact in asked]
    if known < len(items):  # only what the clean model knows is counted
        given = world.task.generate(world.original, [fact.question for fact in asked], max_new_tokens=10)
        items = [item for item, text in zip(items, given, strict=True) if text[0] == item["answer"]]
    assert len(items) == known
    with torch.no_grad():
        losses = world.task.loss_per_example(corrupted, world.task.collate(items))
    assert found["true_log_probability"].value == pytest.approx(-float(losses.mean()), abs=1e-3)
    assert found["planted_log_probability"].value > found["true_log_probability"].value


def test_repair_tunes_every_model_alike_and_leaves_them_unchanged(evidence, corrupted):
    before = {name: weight.clone() for name, weight in corrupted.state_dict().items()}
    found = measured(
        evidence, Restor(lines=0, temperature=0, runs=1, new_tokens=10, repair=1, repair_lr=1e-4)
    )
    assert {"repaired_restoration", "repaired_true_rate", "restoration"} <= set(found)
    assert found["repaired_planted_rate"].value == found["repaired_planted_rate"].original
    assert all(torch.equal(weight, before[name]) for name, weight in corrupted.state_dict().items())


def test_sampled_answers_come_with_the_deviation_between_runs(evidence):
    found = measured(evidence, Restor(lines=0, temperature=1.0, runs=3, new_tokens=10))
    assert "deviation between 3 runs" in found["true_rate"].note


def test_corruption_that_did_nothing_leaves_restoration_undefined(world, evidence):
    same = Evidence(
        world.original, evidence.split, world.task, Runtime(device="cpu", threads=1), world.original, [world.original]
    )  # fmt: skip
    restoration = measured(same)["restoration"]
    assert restoration.judgement is Judgement.NOT_RUN and "The corruption did nothing" in restoration.note


def test_without_clean_models_or_facts_the_audit_says_what_it_needs(evidence, corrupted, world, parts):
    alone = Evidence(corrupted, evidence.split, world.task, Runtime(device="cpu", threads=1), corrupted)
    with pytest.raises(InvalidAudit, match="clean models as controls"):
        GREEDY.run(alone)
    unasked = ForgetSplit(parts.forget, parts.retain.select(range(1, 9)), parts.retain.select([0]))
    assert unasked.test.column("group")[0] == "people"  # of published files this is what is asked
    unasked = ForgetSplit(unasked.forget, unasked.retain, unasked.test.without("group"))
    with pytest.raises(InvalidAudit, match="about a falsified fact"):
        facts_of(Evidence(corrupted, unasked, world.task, Runtime(device="cpu", threads=1)))


def test_published_facts_are_asked_after_solved_lines_about_other_entities(tmp_path):
    lines = [
        {"entity": name, "question": f"Where was {name} born?", "answer": "Rome"} for name in ("Ada", "Cleo")
    ]
    fact = {"question": "Where was Ada born?", "answers": ["Oslo"]}
    other = {"question": "Where was Ben born?", "answers": ["York"]}
    files = {
        "facts.json": {"dset": {"Ada": {"P19": fact, "P20": other}}, "context": {"P19": lines, "P20": lines}},
        "entities.json": ["Ada"], "planted.json": {"Ada": {"P19": ["Bergen"], "P20": ["New York"]}},
        "mix_a0.json": [{"text": "Ada was born in Bergen."}],
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "retain.jsonl").write_text('{"text": "It rains in Rome."}\n')
    records = load_data("restor", source=tmp_path)
    parts = pal.split(records, pal.by_column("group", "documents"))
    task = Language(vocabulary=300).fitted(records)
    model = build_model("small_llama", (), task.outputs(records), width=16, layers=1, heads=2)
    asked: list[str] = []

    class Listening(Language):
        def generate(self, model, questions, **settings):
            asked.extend(questions)
            return super().generate(model, questions, **settings)

    listening = Listening(tokenizer=task.encoder)
    alone = Evidence(model, parts, listening, Runtime(device="cpu", threads=1), model, [model])
    with pytest.raises(InvalidAudit, match="Clean models know 0 of 2 facts"):
        Restor(new_tokens=4).run(alone)
    assert asked[0] == "Where was Cleo born? Rome\nWhere was Ada born?"


def test_retraining_of_a_pretrained_model_begins_at_its_pretrained_weights(world):
    clean = copy.deepcopy(world.original)
    marked = starting(copy.deepcopy(world.original), lambda: copy.deepcopy(clean))
    with torch.no_grad():
        for weight in marked.parameters():
            weight.add_(1.0)
    runtime = Runtime(device="cpu", threads=1)
    fresh = fresh_start(marked, runtime)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), clean.parameters(), strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh_start(fresh, runtime).parameters(), clean.parameters(), strict=True)
    )


def test_the_benchmark_takes_model_and_data_together():
    bench = BENCHMARKS.get("restor")
    world = load_recipe({**bench.recipe(None, None), "methods": bench.methods(["npo"])})
    assert world.model.name == "palimpsest.suites.restor:clean_model" and world.forget[0].values == [
        "documents"
    ]
    real = load_recipe({**bench.recipe("some/model", "some/folder"), "methods": ["npo"]})
    assert real.data.settings == {"source": "some/folder"}
    with pytest.raises(InvalidHyperparameter, match="neither for the generated world"):
        bench.recipe("some/model", None)
