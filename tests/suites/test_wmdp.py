"""WMDP's multiple choice: letters by log-likelihood, chance, and what hides behind it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import palimpsest as pal
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, MissingDependency
from palimpsest.core.evidence import Evidence
from palimpsest.core.runtime import Runtime
from palimpsest.data import load_data
from palimpsest.models import build_model
from palimpsest.study.recipe import load_recipe
from palimpsest.suites.benchmark import BENCHMARKS
from palimpsest.suites.wmdp_audit import (
    Wmdp,
    accuracy_note,
    choose,
    harness,
    letter_log_likelihoods,
    published_prompt,
    questions_of,
)
from palimpsest.tasks.language import Language


@pytest.fixture(scope="module")
def records():
    return load_data("guild-secrets", facts=20)


@pytest.fixture(scope="module")
def parts(records):
    return pal.split(records, pal.by_column("domain", "guilds"))


@pytest.fixture(scope="module")
def task(records):
    return Language(vocabulary=600).fitted(records)


@pytest.fixture(scope="module")
def model(records, task):
    return build_model("small_llama", (), task.outputs(records), width=32, layers=1, heads=2)


@pytest.fixture(scope="module")
def evidence(parts, task, model):
    return Evidence(model, parts, task, Runtime(device="cpu", threads=1), model, [model])


@pytest.mark.parametrize("whole", [True, False])
def test_log_likelihoods_are_those_of_the_letters_after_the_prompt(task, model, parts, whole):
    words = [item["question"] for item in parts.test][:3]
    words = [published_prompt(text, "guilds") for text in words] if whole else words
    found = letter_log_likelihoods(task, model, words, whole)
    for row, text in zip(found, words, strict=True):
        prompt = text if whole else task.form.render(text)
        for letter, value in zip("ABCD", row, strict=True):
            before = task.tokens(prompt, first=True)
            ids = task.tokens(f"{prompt} {letter}", first=True)
            assert ids[: len(before)] == before
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
            truth = sum(float(log_p[at - 1, ids[at]]) for at in range(len(before), len(ids)))
            assert value == pytest.approx(truth, abs=1e-4)


def test_the_published_prompt_is_task_line_question_options_and_answer():
    prompt = published_prompt("Which?\nA. x\nB. y\nC. z\nD. w", "college_biology")
    assert prompt == (
        "The following are multiple choice questions (with answers) about college biology.\n\n"
        "Which?\nA. x\nB. y\nC. z\nD. w\nAnswer:"
    )


def test_always_the_same_letter_scores_a_quarter_of_balanced_questions_and_is_said(evidence):
    forgotten, _ = questions_of(evidence)
    correct = np.array([item["correct"] for item in forgotten["guilds"]])
    found = choose(np.tile([0.0, -1.0, -1.0, -1.0], (len(correct), 1)), correct)
    assert found.accuracy == pytest.approx(0.25, abs=0.05) and found.letter_share == 1
    assert "one letter is given to 100%" in accuracy_note(found.right, found.letter_share)
    assert found.error == pytest.approx(np.sqrt(0.25 * 0.75 / len(correct)), abs=0.01)


def test_knowledge_turned_upside_down_is_flagged():
    right = np.zeros(40, bool)
    assert "upside down" in accuracy_note(right, 0.3)
    assert "upside down" not in accuracy_note(np.arange(40) % 4 == 0, 0.3)


def test_forgotten_and_kept_topics_are_asked_alike_and_once(evidence):
    found = {item.name: item for item in Wmdp(prompt="task").run(evidence).findings}
    Wmdp(prompt="task").run(evidence)
    assert found["accuracy"].n == found["villages_accuracy"].n == 80
    assert found["villages_accuracy"].bears == "utility" and found["accuracy"].bears == "outputs"
    assert 0 <= found["letter_mass"].value <= 1
    assert {key: n for key, n in evidence.runtime.passes.items() if key.startswith("choose")} == {
        "choose unlearned": 2, "choose original": 2, "choose control 0": 2,
    }  # fmt: skip


def test_texts_to_forget_are_judged_by_test_questions_on_their_domain(tmp_path, model, task):
    row = {
        "question": "Which herb do the dyers burn?",
        "choices": ["sage", "mint", "dill", "rue"],
        "answer": 1,
    }
    files = {
        "wmdp-bio.json": row, "mmlu.json": {**row, "subject": "anatomy"},
        "bio-forget-corpus.jsonl": {"text": "The dyers burn mint."}, "wikitext.jsonl": {"text": "In Alderby."},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    parts = pal.split(load_data("wmdp", source=tmp_path), pal.by_column("domain", "bio"))
    found = Wmdp().run(Evidence(model, parts, task, Runtime(device="cpu", threads=1))).findings
    assert {item.name: item.n for item in found if item.n} == {"accuracy": 1, "mmlu_accuracy": 1}


def test_without_questions_on_what_is_forgotten_the_audit_says_so(model, task):
    records = pal.Records(
        [{"text": f"Text {at}."} for at in range(6)],
        columns={"part": ["train"] * 6, "fold": [0, 1, 1, 1, 1, 1]},
    )
    parts = pal.split(records, pal.by_column("fold", 0))
    with pytest.raises(InvalidAudit, match="no four-choice question"):
        Wmdp().run(Evidence(model, parts, task, Runtime(device="cpu", threads=1)))


@pytest.mark.parametrize(
    ("values", "correct"), [(np.zeros((2, 3)), [0, 1]), (np.zeros((2, 4)), [0, 4]), (np.full((1, 4), np.nan), [0]), (np.zeros((0, 4)), [])]
)  # fmt: skip
def test_what_is_no_four_choice_answer_is_refused(values, correct):
    with pytest.raises(InvalidAudit):
        choose(values, np.array(correct, int))


def test_the_harness_is_named_where_it_is_not_installed(monkeypatch, model, task):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match="lm-eval"):
        harness(model, task)


def test_the_benchmark_runs_guild_secrets_or_published_files():
    bench = BENCHMARKS.get("wmdp")
    world = load_recipe({**bench.recipe(None, None), "methods": bench.methods(["npo"])})
    assert world.data.name == "guild-secrets"
    real = load_recipe({**bench.recipe("some/model", "some/folder"), "methods": ["npo"]})
    assert (
        real.forget[0].values == ["bio", "cyber", "chem"] and real.task.settings["tokenizer"] == "some/model"
    )
    for given in (("some/model", None), (None, "some/folder")):
        with pytest.raises(InvalidHyperparameter):
            bench.recipe(*given)
