"""TOFU on the generated world and on published files: every metric, each set asked once."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import palimpsest as pal
from palimpsest.audit import examine
from palimpsest.audit.answers import rouge_score
from palimpsest.audit.language.asked import scores
from palimpsest.audit.truth_ratio import smallest_p
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.data import load_data
from palimpsest.forget import forget
from palimpsest.models import build_model
from palimpsest.study.recipe import load_recipe
from palimpsest.suites.benchmark import BENCHMARKS
from palimpsest.suites.tofu_audit import Tofu, answered, greedy_answers, question_sets
from palimpsest.tasks.language import Language
from tests.language_world import trained_world
from tests.suites.published import published

WORLD = Tofu(new_tokens=12, against="answer", items=40)


@pytest.fixture(scope="module")
def world():
    return trained_world("tiny", controls=2)


@pytest.fixture(scope="module")
def evidence(world):
    runtime = Runtime(device="cpu", threads=1)
    return Evidence(world.original, world.split, world.task, runtime, world.original, world.controls)


@pytest.fixture(scope="module")
def untouched(evidence):
    return {item.name: item for item in WORLD.run(evidence).findings}


def test_the_untouched_model_is_told_from_the_retrained_one_and_another_seed_is_not(untouched):
    quality = untouched["forget_quality"]
    assert quality.value < 1e-3 and quality.judgement is Judgement.SEPARATED
    assert quality.controls[0] > 0.05
    assert untouched["log10_forget_quality"].value == pytest.approx(math.log10(quality.value))


def test_forget_quality_says_how_many_items_and_how_small_it_could_be(untouched):
    quality = untouched["forget_quality"]
    assert quality.n == 24
    assert f"smallest attainable {smallest_p(24):.2g} with 24 items" in quality.note


def test_answers_known_by_heart_are_told_from_unknown_ones_by_every_measure(untouched):
    for name, known, unknown in (
        ("forget_probability", 0.9, 0.3),
        ("forget_exact_memorisation", 0.9, 0.35),
        ("forget_extraction_strength", 0.8, 0.4),
    ):
        assert untouched[name].value > known and max(untouched[name].controls) < unknown
        assert untouched[name].k == pytest.approx(1.0)


def test_utility_of_the_retrained_model_is_that_of_the_original(untouched):
    utility = untouched["model_utility"]
    assert utility.controls == pytest.approx([utility.original] * 2, abs=0.03)
    nine = [
        untouched[f"{name}_{measure}"].value
        for name in ("retain", "real_authors", "world_facts")
        for measure in ("probability", "rouge", "truth_ratio")
    ]
    assert utility.value == pytest.approx(stats.hmean(nine))


def test_the_retrained_model_against_itself_has_a_forget_quality_of_1(world):
    own = Evidence(
        world.retrained, world.split, world.task, Runtime(device="cpu", threads=1), world.original, world.controls[:1]
    )  # fmt: skip
    found = {item.name: item for item in WORLD.run(own).findings}
    assert found["forget_quality"].value == 1 and found["forget_quality"].judgement is Judgement.AS_RETRAINED
    assert found["privacy_leak"].value == 0


def test_a_model_of_noise_has_no_utility(world, evidence):
    wrecked = copy.deepcopy(world.original)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in wrecked.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = {item.name: item for item in WORLD.run(evidence.judging(wrecked)).findings}
    assert found["model_utility"].value < 0.05 < found["model_utility"].original


TRAINING = {"batch_size": 16, "lr": 1e-3, "warmup": 0.0, "schedule": "constant"}


@pytest.mark.slow
def test_ascent_for_too_long_is_collapse_and_not_forgetting(world, evidence):
    wrecked = forget(
        world.original, world.split, "grad-ascent", world.task, runtime=evidence.runtime, epochs=8, **TRAINING
    )
    found = {item.name: item for item in WORLD.run(evidence.judging(wrecked)).findings}
    assert found["model_utility"].value < 0.05 and found["forget_quality"].value < 1e-3
    assert found["forget_probability"].value < 0.01  # it looks forgotten to whoever asks for nothing else


@pytest.mark.slow
def test_gradient_difference_gains_orders_of_forget_quality_and_keeps_utility(world, evidence, untouched):
    kept = forget(
        world.original, world.split, "grad-diff", world.task, runtime=evidence.runtime, epochs=3, **TRAINING
    )
    found = {item.name: item for item in WORLD.run(evidence.judging(kept)).findings}
    gain = found["log10_forget_quality"].value - untouched["log10_forget_quality"].value
    assert gain >= 3 and found["model_utility"].value > 0.7 * untouched["model_utility"].value


def test_every_set_is_scored_once_and_answered_once(world):
    fresh = Evidence(
        world.original, world.split, world.task, Runtime(device="cpu", threads=1), None, world.controls[:1]
    )
    examine(fresh, [WORLD, WORLD])
    passes = fresh.runtime.passes
    assert passes["score unlearned"] == passes["score control 0"] == 5
    assert 1 <= passes["generate unlearned"] <= 4 and 1 <= passes["generate control 0"] <= 4


def test_answers_known_by_heart_are_what_generation_would_give(world, evidence):
    asked = [item for those in question_sets(evidence, 12).values() for item in those]
    given = scores(evidence, "control 0", asked, [[item.answer] for item in asked])
    known = [bool(item.right.all()) for item in given]
    assert 5 < sum(known) < len(known)
    skipped = greedy_answers(evidence, "control 0", asked, given, 12)
    assert skipped == greedy_answers(evidence, "control 0", asked, given, 12, skip=False)
    assert greedy_answers(evidence, "control 0", asked, given, 1) != skipped  # cut after one token


def test_losses_are_those_of_one_plain_pass_per_answer(world, evidence):
    asked = question_sets(evidence, 5)["forget"]
    found = answered(evidence, UNLEARNED, asked, 12)
    for at, question in enumerate(asked):
        texts = [question.answer, question.paraphrase, *question.wrong]
        items = [{"question": question.question, "answer": text} for text in texts]
        with torch.no_grad():
            losses = world.task.loss_per_example(world.original, world.task.collate(items)).numpy()
        mine = [found.losses.answer[at], found.losses.paraphrase[at], *found.losses.wrong[at]]
        np.testing.assert_allclose(mine, losses, rtol=1e-4, atol=1e-5)
    texts = [
        text[0]
        for text in world.task.generate(world.original, [q.question for q in asked], max_new_tokens=12)
    ]
    recall = [item.recall for item in rouge_score(texts, [q.answer for q in asked], stem=True)]
    assert found.losses.rouge.tolist() == recall


def test_a_missing_set_leaves_utility_out_instead_of_averaging_the_rest(world, evidence):
    people = world.split.retain.select(world.split.retain.column("group") == "people")
    alone = ForgetSplit(world.split.forget, people, None, world.split.holdout)
    found = {
        item.name: item
        for item in WORLD.run(replace(evidence, split=alone, _parts={}, _memory={}, _observed={})).findings
    }
    utility = found["model_utility"]
    assert utility.value is None and utility.judgement is Judgement.NOT_RUN
    assert "real_authors, world_facts" in utility.note
    assert "retain_probability" in found and "world_facts_probability" not in found


def test_without_controls_or_holdout_what_needs_them_is_not_run(world):
    parts = ForgetSplit(world.split.forget, world.split.retain, world.split.test)
    alone = Evidence(world.original, parts, world.task, Runtime(device="cpu", threads=1))
    found = {item.name: item for item in WORLD.run(alone).findings}
    assert found["forget_quality"].judgement is found["privacy_leak"].judgement is Judgement.NOT_RUN
    assert found["forget_probability"].value > 0.9


def test_questions_without_wrong_answers_are_refused(world):
    records = pal.Records(
        [{"question": f"Who is {at}?", "answer": f"Number {at}."} for at in range(8)],
        columns={"part": ["train"] * 8, "fold": [0, 0, 1, 1, 1, 1, 1, 1]},
    )
    parts = pal.split(records, pal.by_column("fold", 0))
    alone = Evidence(world.original, parts, world.task, Runtime(device="cpu", threads=1))
    with pytest.raises(InvalidAudit, match="perturbed_answer"):
        WORLD.run(alone)


def test_questions_with_other_numbers_of_wrong_answers_are_refused(world, evidence):
    asked = question_sets(evidence, 4)["forget"]
    with pytest.raises(InvalidAudit, match=r"lists of \[2, 5\]"):
        answered(evidence, UNLEARNED, [replace(asked[0], wrong=asked[0].wrong[:2]), *asked[1:]], 4)


@pytest.mark.parametrize("settings", [{"items": 0}, {"new_tokens": 0}, {"k": 0.0}, {"against": "both"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidAudit):
        Tofu(**settings)


def test_the_benchmark_takes_published_files_and_a_model_by_name():
    bench = BENCHMARKS.get("tofu")
    recipe = load_recipe(
        {**bench.recipe("some/model", "some/folder"), "methods": bench.methods(["npo"], "some/model")}
    )
    assert recipe.model.name == "hf:some/model" and recipe.data.settings == {"source": "some/folder"}
    assert recipe.forget[0].column == "forget10" and recipe.methods[0].settings == {}
    world = load_recipe({**bench.recipe(None, None), "methods": bench.methods(["npo"])})
    assert world.data.name == "people" and world.methods[0].settings["lr"] == 1e-3


def test_published_files_and_the_generated_world_run_through_the_same_code(tmp_path):
    source = published("tofu")
    for name in ("forget10_perturbed", "real_authors_perturbed", "world_facts_perturbed", "retain_perturbed"):
        lines = (source / f"{name}.json").read_text().splitlines()[:6]
        (tmp_path / f"{name}.json").write_text("\n".join(lines))
    for name, file in (("forget10", "forget10_perturbed"), ("retain90", "retain_perturbed")):
        rows = [json.loads(line) for line in (tmp_path / f"{file}.json").read_text().splitlines()]
        kept = [{"question": item["question"], "answer": item["answer"]} for item in rows]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, kept)))
    records = load_data("tofu", source=tmp_path)
    parts = pal.split(records, pal.by_column("forget10", 1))
    task = Language(vocabulary=500).fitted(records)
    model = build_model("small_llama", (), task.outputs(records), width=16, layers=1, heads=2, length=512)
    alone = Evidence(model, parts, task, Runtime(device="cpu", threads=1), model, [copy.deepcopy(model)])
    found = {item.name: item for item in Tofu(new_tokens=4).run(alone).findings}
    assert found["forget_quality"].value == 1 and found["forget_quality"].judgement is Judgement.INVALID
    assert found["forget_probability"].n == 6 and found["model_utility"].value is not None
