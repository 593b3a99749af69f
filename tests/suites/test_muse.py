"""MUSE on the generated world and on published files: six ways, the checkpoint rule, and what bad files are told."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import palimpsest as pal
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, InvalidRecords
from palimpsest.core.evidence import ORIGINAL, Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit, in_turn
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.data import load_data
from palimpsest.data.muse import pieces
from palimpsest.forget import forget
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE
from palimpsest.forget.language.gradient_difference import GradientAscent, GradientDifference
from palimpsest.models import build_model
from palimpsest.parts.training import RECIPE_ATTRIBUTE, TrainingRecipe
from palimpsest.report.muse import SHOWN, muse_chart, muse_rows
from palimpsest.study.recipe import load_recipe
from palimpsest.suites.benchmark import BENCHMARKS
from palimpsest.suites.muse import WORLD, muse_recipe, world_requests
from palimpsest.suites.muse_audit import Muse, MuseSets, document_signals, halves
from palimpsest.suites.muse_checkpoints import CHECKPOINT_ATTRIBUTE, MuseCheckpoint, first_below
from palimpsest.suites.muse_scores import STOPS
from palimpsest.tasks.language import Language
from tests.language_world import trained_world

SMALL = {"batch_size": 16, "warmup": 0.0, "schedule": "constant"}
ON_WORLD = Muse(**{**WORLD, "items": 24})


@pytest.fixture(scope="module")
def world():
    return trained_world("tiny", controls=2)


@pytest.fixture(scope="module")
def evidence(world):
    runtime = Runtime(device="cpu", threads=1)
    return Evidence(world.original, world.split, world.task, runtime, world.original, world.controls)


@pytest.fixture(scope="module")
def untouched(evidence):
    return ON_WORLD.run(evidence)


@pytest.fixture(scope="module")
def found(untouched):
    return {item.name: item for item in untouched.findings}


def test_the_untouched_model_leaks_everything_and_the_retrained_one_nothing(found):
    leak = found["privacy_leak"]
    assert leak.value < -70 and leak.value == leak.original
    assert leak.controls[0] == 0
    area = found["privacy_auc"]
    assert chance(area.value) < 0.01 and min(chance(value) for value in area.controls) > 0.05


def chance(area: float, forget: int = 4, holdout: int = 8) -> float:
    """Share of all ways to name `forget` documents among all of them that are as far from 1/2 as this area."""
    ways = list(combinations(range(forget + holdout), forget))
    ranks = np.array([sum(ranked) - forget * (forget - 1) / 2 for ranked in ways]) / (forget * holdout)
    return float(np.mean(np.abs(ranks - 0.5) >= abs(area - 0.5) - 1e-9))


def test_forget_questions_are_known_to_the_original_only(found):
    knowmem = found["knowmem_forget"]
    assert knowmem.value > 90 and max(knowmem.controls) < 25
    assert knowmem.k == pytest.approx(1.0) and knowmem.judgement is Judgement.SEPARATED
    assert knowmem.low > 80 and knowmem.high <= 100


def test_running_text_is_continued_by_the_model_that_was_trained_on_it(found):
    verbmem = found["verbmem"]
    assert verbmem.value > max(verbmem.controls) + 20


def test_utility_is_asked_in_words_that_no_method_trains_on(found, world):
    retain = found["knowmem_retain"]
    assert retain.bears == "utility" and retain.low <= retain.value <= retain.high
    assert retain.controls == pytest.approx([retain.original] * 2, abs=15)
    asked = {question for question, _ in MuseSets(world.split, 1000).retain_questions}
    trained = {item.get("question") for item in world.split.train}
    assert asked and not asked & trained


def test_people_whom_earlier_requests_took_are_no_measure_of_utility(world):
    turns = in_turn([pal.split(world.records, pal.by_column("fold", fold)) for fold in (0, 1)])
    gone = {person.name for fold in (0, 1) for person in world.world.group(fold=fold)}
    asked = [question for question, _ in MuseSets(turns[1], 1000).retain_questions]
    assert asked and not any(name in question for name in gone for question in asked)


def test_the_area_is_that_of_documents_scored_one_by_one(world, evidence, found):
    sides = MuseSets(world.split).documents()
    signals = [document_signals(evidence, ORIGINAL, *sides[side], 0.4) for side in ("forget", "holdout")]
    alone = []
    for part in ("forget", "holdout"):
        texts = [item for item in world.split.parts[part] if "text" in item]
        alone.append([_min_k(world, text) for text in texts])
    for ours, plain in zip(signals, alone, strict=True):
        assert ours == pytest.approx(plain, rel=1e-4)
    members = [1] * len(alone[0]) + [0] * len(alone[1])
    member_area = roc_auc_score(members, [-value for side in alone for value in side])
    assert found["privacy_auc"].value == pytest.approx(1 - member_area)


def _min_k(world, item) -> float:
    batch = world.task.collate([item])
    logits = world.task.logits(world.original, batch).detach()[0, :-1].log_softmax(1)
    labels = batch["labels"][0, 1:]
    own = sorted(float(logits[at, token]) for at, token in enumerate(labels.tolist()) if token >= 0)
    return -float(np.mean(own[: int(0.4 * len(own))]))


def test_privacy_leakage_without_a_retrained_model_is_not_run(world):
    alone = Evidence(
        world.original, world.split, world.task, Runtime(device="cpu", threads=1), world.original
    )
    leak = ON_WORLD._leak(alone, MuseSets(world.split))[0]
    assert leak.judgement is Judgement.NOT_RUN and "retrained model" in leak.note


def test_every_answer_of_every_model_stands_in_the_table(untouched, evidence):
    rows = untouched.series["muse"]
    assert {row["model"] for row in rows} == set(evidence.roles)
    assert {row["set"] for row in rows} == {"verbmem", "knowmem_forget", "knowmem_retain"}
    mine = [row["f1"] for row in rows if row["set"] == "knowmem_forget" and row["model"] == "unlearned"]
    assert 100 * np.mean(mine) == pytest.approx(100)


def test_solved_examples_come_before_the_question_and_are_never_asked(world):
    sets = MuseSets(world.split, limit=5, shots=10)
    shown = sets.examples("forget")
    asked = {question for question, _ in [*sets.forget_questions, *sets.retain_questions]}
    assert len(shown) == 10 and not asked & {question for question, _ in shown}
    forgotten = set(world.split.forget.column("subject")) - {""}
    assert not any(name in question for name in forgotten for question, _ in shown)


def test_prompts_that_do_not_fit_the_context_are_refused_before_anything_is_generated(evidence):
    with pytest.raises(InvalidAudit, match=r"do not fit the context of 256.*Lower shots"):
        Muse(shots=30, items=4).run(evidence)


@pytest.mark.parametrize(
    "settings", [{"shots": -1}, {"items": 1}, {"k": 0.0}, {"k": 1.5}, {"verbatim_tokens": 0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidAudit):
        Muse(**settings)


def test_a_model_that_writes_nonsense_forgets_and_has_no_utility(world, evidence):
    ruined = forget(world.original, world.split, GradientAscent(lr=3e-3, epochs=3, **SMALL), world.task)
    scores = {item.name: item.value for item in ON_WORLD.run(evidence.judging(ruined)).findings}
    assert scores["knowmem_forget"] < 20 and scores["knowmem_retain"] < 30


class TestCheckpoints:
    def test_the_first_epoch_at_the_retrained_score_is_taken(self, world):
        runtime = Runtime(device="cpu", threads=1)
        method = GradientDifference(lr=1e-3, epochs=8, **SMALL)
        model, seen = first_below(method, world.original, world.split, world.task, runtime, 50.0, ON_WORLD)
        assert seen[-1] <= 50 < min(seen[:-1], default=math.inf)
        epochs = {int(row["epoch"]) for row in getattr(model, HISTORY_ATTRIBUTE)}
        assert epochs == set(range(len(seen))) and len(seen) < 8
        # and it is the model of a run that ends there
        short = replace(method, epochs=len(seen)).unlearn(
            world.original, world.split, world.task, Runtime(device="cpu", threads=1)
        )
        for ours, plain in zip(model.parameters(), short.parameters(), strict=True):
            assert ours.equal(plain)

    def test_where_none_is_low_enough_the_last_is_taken(self, world):
        chosen = MuseCheckpoint(
            "grad-diff", {"lr": 1e-6, "epochs": 2, **SMALL}, retrained=10.0, knowmem={**WORLD, "items": 8}
        )
        model = forget(world.original, world.split, chosen, world.task)
        note = getattr(model, CHECKPOINT_ATTRIBUTE)
        assert note["epoch"] == 1 and len(note["knowmem"]) == 2 and min(note["knowmem"]) > 10

    def test_a_method_without_epochs_is_refused(self):
        with pytest.raises(InvalidHyperparameter, match="has no epochs"):
            MuseCheckpoint("retrain")


class TestRequests:
    def test_scalability_grows_and_sustainability_shares_nothing(self):
        nested = [set(item["values"]) for item in world_requests("scalability", 5)]
        assert all(inner < outer for inner, outer in pairwise(nested))
        disjoint = [set(item["values"]) for item in world_requests("sustainability", 5)]
        assert len(set.union(*disjoint)) == sum(map(len, disjoint)) == 4

    @pytest.mark.parametrize("name", ["muse", "muse-tiny", "muse-scalability", "muse-sustainability"])
    def test_every_benchmark_is_a_recipe(self, name):
        made = BENCHMARKS.get(name)
        for model, data in ((None, None), ("gpt2", None), (None, "muse-bench/MUSE-News"), ("gpt2", "news")):
            tree = {**made.recipe(model, data), "methods": made.methods(["npo"], model)}
            recipe = load_recipe(tree)
            assert recipe.in_turn == (name == "muse-sustainability")
            assert [item.name for item in recipe.audits or []] == ["muse", "cost"]

    def test_scores_become_curves_over_the_requests(self, found):
        reports = [_report(name, step, found) for name in ("npo", "grad-diff") for step in range(3)]
        rows = muse_rows(reports)
        assert sorted(rows["step"].unique()) == [1, 2, 3] and set(rows["shown"]) <= set(SHOWN.values())
        chart = muse_chart(reports)
        assert chart is not None and len(chart["datasets"]["rows"]) == 2 * 3 * rows["shown"].nunique()
        assert muse_chart(reports[:1]) is None


def _report(label: str, step: int, found: dict[str, Any]):
    from palimpsest.audit.report import AuditReport
    from palimpsest.audit.verdict import Verdict

    facts = {"label": label, "method": label, "request": f"{step + 1} folds", "step": 0, "review": False}
    return AuditReport(Verdict.INCONCLUSIVE, (), tuple(found.values()), facts=facts)


def write(folder: Path, name: str, rows: Any) -> None:
    file = folder / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = {
        role: [f"{role} number {at} tells a story of its own" for at in range(4)]
        for role in ("forget", "retain1", "retain2", "holdout")
    }
    for role, rows in texts.items():
        write(tmp_path, f"raw/{role}", [{"text": text} for text in rows])
    write(tmp_path, "verbmem/forget", [{"prompt": "forget number 0 tells", "gt": "a story of its own"}])
    for name in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"):
        write(
            tmp_path,
            f"knowmem/{name}",
            [{"question": f"{name} {at}?", "answer": f"a {at}"} for at in range(3)],
        )
    write(tmp_path, "privleak/forget", texts["forget"])
    write(tmp_path, "privleak/holdout", texts["holdout"])
    for number in range(1, 5):
        write(tmp_path, f"scal/forget_{number}", texts["forget"][:number])
        write(tmp_path, f"sust/forget_{number}", texts["forget"][number - 1 : number])
    return tmp_path


class TestPublishedFiles:
    def test_every_split_is_found_under_its_role(self, folder):
        parts = pal.split(load_data("muse", source=folder), pal.by_column("role", "forget"))
        assert len(parts.forget) == 4 and len(parts.retain) == 8 and len(parts.holdout) == 8
        sets = MuseSets(parts, shots=3)
        assert sets.published
        assert sets.verbatim == [("forget number 0 tells", "a story of its own")]
        assert [question for question, _ in sets.retain_questions] == [f"retain_qa {at}?" for at in range(3)]
        assert sets.examples("retain") == [(f"retain_qa_icl {at}?", f"a {at}") for at in range(3)]
        assert {side: len(at) for side, (_, at) in sets.documents().items()} == {"forget": 4, "holdout": 4}

    def test_methods_never_see_what_only_evaluates(self, folder):
        parts = pal.split(load_data("muse", source=folder), pal.by_column("role", "forget"))
        seen = parts.for_methods
        assert {item["text"].split()[0] for item in seen.retain} == {"retain1"}
        assert len(parts.train) == 12

    @pytest.mark.parametrize(
        ("name", "seen"), [("grad-diff", {"retain1"}), ("retrain", {"retain1", "retain2"})]
    )
    def test_only_who_trains_anew_is_given_the_reserved_records(self, folder, name, seen):
        records = load_data("muse", source=folder)
        parts = pal.split(records, pal.by_column("role", "forget"))
        task = Language(vocabulary=300, verify_template=False).fitted(records)
        model = build_model("small_llama", (), task.outputs(records), width=16, layers=1, heads=2)
        setattr(model, RECIPE_ATTRIBUTE, TrainingRecipe(epochs=1))
        given: list[ForgetSplit] = []

        class Onlooker:
            card = UNLEARNERS.get(name).card

            def unlearn(self, model, split, task, runtime):
                given.append(split)
                return copy.deepcopy(model)

        forget(model, parts, Onlooker(), task)
        assert given[0].retain is not None
        assert {item["text"].split()[0] for item in given[0].retain} == seen

    def test_sets_of_scalability_and_sustainability_have_columns(self, folder):
        records = load_data("muse", source=folder)
        for number in range(1, 5):
            assert len(pal.split(records, pal.by_column(f"scal_{number}", 1)).forget) == number
            assert len(pal.split(records, pal.by_column(f"sust_{number}", 1)).forget) == 1

    def test_the_whole_audit_runs_on_them_with_the_published_prompts(self, folder):
        records = load_data("muse", source=folder)
        parts = pal.split(records, pal.by_column("role", "forget"))
        task = Language(vocabulary=300).fitted(records)
        model = build_model("small_llama", (), task.outputs(records), width=16, layers=1, heads=2, length=512)
        given = Evidence(model, parts, task, Runtime(device="cpu", threads=1), model, [model])
        scores = {
            item.name: item for item in Muse(shots=3, verbatim_tokens=8, answer_tokens=4).run(given).findings
        }
        assert scores["privacy_leak"].value == 0 and scores["privacy_leak"].n == 8
        assert scores["knowmem_forget"].n == 3

    def test_long_texts_are_cut_into_consecutive_pieces(self, folder):
        records = load_data("muse", source=folder, words=4)
        parts = pal.split(records, pal.by_column("role", "forget"))
        assert len(parts.forget) == 12
        assert " ".join(item["text"] for item in parts.forget).startswith(
            "forget number 0 tells a story of its"
        )
        assert pieces("a  b", 4) == ["a  b"]

    def test_a_missing_file_is_named(self, folder):
        (folder / "knowmem" / "retain_qa.json").unlink()
        with pytest.raises(InvalidRecords, match=r"lacks .*knowmem/retain_qa"):
            load_data("muse", source=folder)

    @pytest.mark.parametrize(
        ("file", "rows", "said"),
        [
            (
                "knowmem/forget_qa",
                [{"question": "a?", "answer": "b"}, {"question": "c?"}],
                'row 2: no column "answer"',
            ),
            ("verbmem/forget", [{"prompt": "a", "gt": " "}], 'row 1, column "gt"'),
            ("raw/forget", [{"text": "one two"}, {"text": 3}], 'row 2, column "text"'),
            ("privleak/holdout", ["a b", ""], "row 2: a text that is not empty"),
            ("privleak/forget", [], "privleak/forget.*hold no rows"),
            ("scal/forget_2", ["another text"], "scal/forget_1, row 1: the text is not in scal/forget_2"),
            (
                "sust/forget_2",
                ["forget number 0 tells a story of its own"],
                "sust/forget_2, row 1.*sust/forget_1",
            ),
        ],
    )
    def test_what_is_wrong_with_a_file_is_said_by_row_and_column(self, folder, file, rows, said):
        write(folder, file, rows)
        with pytest.raises(InvalidRecords, match=said):
            load_data("muse", source=folder)


def test_published_stops_are_those_of_the_prompt():
    assert STOPS[0] == "\n\n"
    with pytest.raises(InvalidAudit, match="no continuation"):
        halves("alone")


def test_recipes_of_the_world_share_its_training_with_other_suites():
    ours, theirs = (
        muse_recipe("tiny", None, None, "request"),
        BENCHMARKS.get("people-tiny").recipe(None, None),
    )
    for key in ("data", "model", "task", "training"):
        assert ours[key] == theirs[key]
