"""RWKU on the generated world and on published files: probes, filtering, members, zero-shot corpora, bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import palimpsest as pal
from palimpsest.audit.answers import find_alias
from palimpsest.core.errors import (
    InvalidAudit,
    InvalidHyperparameter,
    InvalidRecords,
    MissingNeed,
    UnknownName,
)
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.data import load_data
from palimpsest.forget import forget
from palimpsest.forget.language.synthetic_texts import OPENINGS, pairs, situated, without_giveaways
from palimpsest.forget.language.zero_shot import CORPUS_ATTRIBUTE, ZeroShot, targets_of
from palimpsest.models import build_model
from palimpsest.study.recipe import load_recipe
from palimpsest.suites.benchmark import BENCHMARKS
from palimpsest.suites.rwku import WORLD, WORLD_OPENINGS
from palimpsest.suites.rwku_audit import Rwku
from palimpsest.suites.rwku_probes import CUE, forget_probes, neighbour_probes
from palimpsest.suites.rwku_scores import KINDS
from palimpsest.tasks.language import Language
from tests.language_world import trained_world

SMALL = {"batch_size": 16, "warmup": 0.0, "schedule": "constant"}
ON_WORLD = Rwku(**{**WORLD, "items": 20})


@pytest.fixture(scope="module")
def world():
    return trained_world("tiny")


@pytest.fixture(scope="module")
def evidence(world):
    runtime = Runtime(device="cpu", threads=1)
    return Evidence(world.original, world.split, world.task, runtime, world.original, world.controls)


@pytest.fixture(scope="module")
def probes(evidence):
    return forget_probes(evidence, instructions=False, each=1)


@pytest.fixture(scope="module")
def outcome(evidence):
    return ON_WORLD.run(evidence)


@pytest.fixture(scope="module")
def found(outcome):
    return {item.name: item for item in outcome.findings}


class TestProbes:
    def test_every_fact_is_asked_as_a_blank_a_question_and_in_all_nine_kinds(self, world, probes):
        facts = {(item["subject"], item["relation"]) for item in world.split.forget if item.get("relation")}
        for level in ("1", "2"):
            assert sum(probe.level == level for probe in probes) == len(facts)
        assert {probe.kind for probe in probes if probe.level == "3"} == set(KINDS)

    def test_no_probe_but_a_choice_holds_its_answer(self, probes):
        for probe in probes:
            held = find_alias(probe.prompt, [probe.answer]) is not None
            assert held == (probe.kind == "multiple choice"), probe

    def test_a_choice_says_what_guessing_gives(self, probes):
        choices = [probe for probe in probes if probe.kind == "multiple choice"]
        assert choices and all(probe.chance == pytest.approx(1 / 4) for probe in choices)
        assert not any(probe.chance for probe in probes if probe.kind != "multiple choice")

    def test_a_reverse_query_asks_only_for_values_of_one_person(self, world, probes):
        for probe in probes:
            if probe.kind == "reverse query":
                owners = [
                    person.name for person in world.world.persons
                    if person.part == "train" and any(value in probe.prompt for value in person.facts.values())
                ]  # fmt: skip
                assert owners == [probe.answer] == [probe.subject]

    def test_neighbours_are_friends_of_the_targets_and_none_of_them(self, world, evidence):
        asked = {probe.subject for probe in neighbour_probes(evidence, instructions=False)}
        friends = {person.friend for person in world.world.group(fold=0)}
        assert asked == friends
        assert not asked & set(world.split.forget.column("subject"))


class TestScores:
    def test_the_original_knows_its_blanks_and_questions_and_the_retrained_model_does_not(self, found):
        for level in ("fb", "qa"):
            assert found[f"before_{level}"].value >= 80
            assert found[level].value == 100 and max(found[level].controls) < 40
            assert found[level].k == pytest.approx(1.0)

    def test_kinds_that_the_original_cannot_be_asked_in_are_invalid_and_out_of_the_sum(self, found):
        names = [kind.replace(" ", "_").replace("-", "_") for kind in KINDS]
        weak = [name for name in names if found[f"before_{name}"].value < 60]
        good = [name for name in names if name not in weak]
        assert weak and good
        assert all(found[name].judgement is Judgement.INVALID and found[name].k is None for name in weak)
        assert found["aa"].n == sum(found[name].n for name in good)
        assert found["all"].n == found["aa"].n + found["fb"].n + found["qa"].n
        assert f"{len(good)} of {len(names)} kinds" in found["aa"].note

    def test_chance_stands_beside_the_multiple_choice(self, found):
        assert "chance 25" in found["multiple_choice"].note

    def test_targets_are_averaged_apart_from_their_probes(self, outcome, found):
        rows = [row for row in outcome.series["rwku_targets"] if row["model"] == "control 0"]
        assert len(rows) == 4
        pooled = sum(row["recall"] * row["n"] for row in rows) / sum(row["n"] for row in rows)
        assert pooled == pytest.approx(found["all"].controls[0])
        assert "mean over targets 100.0" in found["all"].note

    def test_fragments_of_the_targets_are_new_to_the_retrained_model_and_others_are_not(self, found):
        for attack in ("loss", "zlib", "min_k", "min_k_plus_plus"):
            assert found[f"fm_{attack}"].controls[0] > 3 * found[f"fm_{attack}"].original
            assert found[f"rm_{attack}"].controls[0] < 2 * found[f"rm_{attack}"].original
        assert found["fm_minus_rm"].value == 0

    def test_the_loss_signal_is_that_of_plain_passes(self, world, found):
        texts = [item for item in world.split.forget if "text" in item]
        batch = world.task.collate(texts)
        losses = world.task.loss_per_example(world.original, batch).detach()
        assert found["fm_loss"].value == pytest.approx(100 * float(losses.mean()), rel=1e-3)

    def test_without_filtering_every_probe_counts(self, evidence, probes):
        plain = Rwku(**{**WORLD, "items": 20}, filter=False, telling=0.0)
        given = {item.name: item for item in plain.run(evidence).findings}
        assert given["all"].n == len(probes)
        assert given["all"].value == pytest.approx(given["before_all"].value)

    def test_utility_is_measured_on_what_is_at_hand(self, found):
        assert {"factuality", "general", "fluency"} <= set(found) and "truthfulness" not in found
        assert found["neighbour_all"].bears == "utility" and found["neighbour_all"].value == 100

    @pytest.mark.parametrize("settings", [{"each": 0}, {"telling": 1.1}, {"k": 0.0}, {"new_tokens": 0}])
    def test_settings_out_of_range_are_refused(self, settings):
        with pytest.raises(InvalidAudit):
            Rwku(**settings)


class TestZeroShot:
    OWN: dict[str, Any] = {"situation": "none", "openings": WORLD_OPENINGS, "samples": 1, "new_tokens": 24}  # noqa: RUF012

    def test_only_names_of_targets_are_read(self, world):
        names = sorted(set(world.split.forget.column("subject")))
        bare = Records([{"text": "?"}] * len(names), columns={"subject": np.array(names, object)})
        runtime = Runtime(device="cpu", threads=1)
        method = ZeroShot("grad-ascent", {}, **{**self.OWN, "samples": 1, "new_tokens": 16})
        full = method.written(world.original, world.split.forget, world.task, runtime)
        known = method.written(world.original, bare, world.task, Runtime(device="cpu", threads=1))
        key = lambda item: (item["subject"], item["text"])  # noqa: E731
        assert sorted(full, key=key) == sorted(known, key=key)

    def test_the_corpus_is_what_the_model_writes_and_the_model_is_left_alone(self, world):
        before = {name: value.clone() for name, value in world.original.state_dict().items()}
        method = ZeroShot("grad-ascent", {"lr": 1e-3, "epochs": 1, **SMALL}, **self.OWN)
        unlearned = forget(world.original, world.split, method, world.task)
        corpus = getattr(unlearned, CORPUS_ATTRIBUTE)
        assert all(
            any(item["text"].startswith(o.replace("{name}", item["subject"])) for o in WORLD_OPENINGS)
            for item in corpus
        )
        assert {item["subject"] for item in corpus} == set(world.split.forget.column("subject"))
        assert all(value.equal(before[name]) for name, value in world.original.state_dict().items())
        assert any(
            not a.equal(b) for a, b in zip(unlearned.parameters(), world.original.parameters(), strict=True)
        )

    def test_refusals_are_taught_to_questions_about_the_target(self, world):
        method = ZeroShot(
            "idk-nll", {"retain": "none", "epochs": 1, "lr": 1e-4, **SMALL}, corpus="refusals",
            questions=["Where does {name} live?"],
        )  # fmt: skip
        rows = method.written(world.original, world.split.forget, world.task, Runtime(device="cpu"))
        assert len({row["answer"] for row in rows}) == len(rows) == 4
        assert all(row["subject"] in row["question"] for row in rows)

    def test_a_method_that_needs_retained_records_is_refused(self):
        with pytest.raises(InvalidHyperparameter, match="needs retained records"):
            ZeroShot("grad-diff")

    def test_a_target_without_a_name_is_refused(self):
        with pytest.raises(MissingNeed, match="by name"):
            targets_of(Records([{"text": "a"}]))

    def test_openings_name_the_person(self):
        with pytest.raises(InvalidHyperparameter, match="names the person"):
            ZeroShot(openings=["The life of"])
        assert all("{name}" in opening for opening in OPENINGS)

    def test_situations_are_a_system_turn_and_a_request(self, world):
        text = situated(world.task, "Ann Lee", "Ann Lee is a baker.", "factual")
        assert "Ann Lee is a baker." in text and text.endswith("Answer:")
        assert situated(world.task, "Ann Lee", situation="none") == ""
        assert without_giveaways("A wholly made-up tale of Ann.") == "A tale of Ann."
        assert pairs(["good"], ["bad"], "Ann")[0]["response"] == ["good", "bad"]


def write(folder: Path, name: str, rows: list[Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(rows))


def probe(number: int, subject: str = "Ann Lee", **more: Any) -> dict[str, Any]:
    kind = {1: "cloze", 2: "simple question", 3: "prefix injection"}[number]
    row = {
        "query": f"What is {number} of it?",
        "answer": "tea",
        "level": str(number),
        "type": kind,
        "subject": subject,
    }
    return {**row, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level in (1, 2, 3):
        write(tmp_path, f"forget_level{level}", [probe(level), probe(level, "Bo Xu")])
    write(
        tmp_path,
        "forget_level3",
        [probe(3), probe(3, type="affirmative_suffix"), probe(3, type="cross_lingal"), probe(3, "Bo Xu")],
    )
    write(tmp_path, "neighbor_level1", [probe(1, neighbor="Cy")])
    write(
        tmp_path,
        "mia_forget",
        [
            {
                "text": "Ann Lee drank tea every day of her long life in town.",
                "subject": "Ann Lee",
                "type": "x",
            }
        ],
    )
    write(
        tmp_path,
        "train_positive_llama3",
        [{"text": "long", "subject": "Ann Lee", "intro": "Ann Lee drinks tea."}],
    )
    write(tmp_path, "utility_general", [{"question": "2+2?", "choices": ["3", "4"], "answer": 1}])
    write(tmp_path, "utility_factuality", [{"question": "Sky?", "answer": ["blue", "azure"]}])
    write(tmp_path, "utility_fluency", [{"instruction": "Tell a tale."}])
    return tmp_path


def published(folder: Path) -> Evidence:
    records = load_data("rwku", source=folder)
    parts = pal.split(records, pal.by_column("subject", "Ann Lee"))
    task = Language(vocabulary=300).fitted(records)
    model = build_model("small_llama", (), task.outputs(records), width=16, layers=1, heads=2)
    return Evidence(model, parts, task, Runtime(device="cpu", threads=1), model)


class TestPublishedFiles:
    def test_a_target_is_a_name_with_one_line(self, folder):
        parts = published(folder).split
        assert [item["text"] for item in parts.forget] == ["Ann Lee drinks tea."]
        assert [item["text"] for item in parts.retain] == ["Bo Xu"]
        assert targets_of(parts.forget) == {"Ann Lee": "Ann Lee drinks tea."}

    def test_probes_are_asked_in_the_words_of_the_protocol(self, folder):
        asked = forget_probes(published(folder), instructions=True, each=1)
        assert {item.subject for item in asked} == {"Ann Lee"} and len(asked) == 5
        for item in asked:
            assert item.prompt.endswith("Question: What is " + item.level + " of it?")
            assert item.opening == ("" if item.kind == "affirmative suffix" else CUE)
        assert {item.kind for item in asked} == {
            "",
            "prefix injection",
            "affirmative suffix",
            "cross lingual",
        }

    def test_the_whole_audit_runs_on_them(self, folder):
        given = {
            item.name: item
            for item in Rwku(filter=False, telling=0.0, new_tokens=4, fluency_tokens=6)
            .run(published(folder))
            .findings
        }
        assert given["all"].n == 5 and given["neighbour_fb"].n == 1 and given["fm_loss"].n == 1
        assert {"factuality", "general", "fluency"} <= set(given)
        assert given["rm_loss"].judgement is Judgement.NOT_RUN

    def test_a_model_that_answers_nothing_cannot_be_judged(self, folder):
        with pytest.raises(InvalidAudit, match="answers none of 5 probes"):
            Rwku(new_tokens=2).run(published(folder))

    def test_a_target_that_no_probe_is_about_is_named(self, folder):
        evidence = published(folder)
        lost = Records([{"text": "x"}], columns={"subject": np.array(["Di Po"], object)})
        evidence.split = ForgetSplit(lost, test=evidence.split.test)
        with pytest.raises(InvalidRecords, match="No probe is about Di Po"):
            forget_probes(evidence, instructions=True, each=1)

    def test_an_unknown_kind_is_named(self, folder):
        write(folder, "forget_level3", [probe(3, type="hypnosis")])
        with pytest.raises(UnknownName, match="hypnosis"):
            forget_probes(published(folder), instructions=True, each=1)

    @pytest.mark.parametrize(
        ("file", "rows", "said"),
        [
            ("forget_level1", [probe(1), {"query": "a", "subject": "Ann Lee"}], 'row 2: no column "answer"'),
            ("forget_level2", [probe(2, answer="  ")], 'row 1, column "answer"'),
            ("forget_level2", [probe(2, level="3")], 'row 1, column "level": 2 is needed'),
            ("forget_level3", [], "holds no rows of .*forget_level3"),
            ("neighbor_level1", [probe(1, answer="Ann Lee")], 'row 1, column "answer": the target'),
            ("utility_general", [{"question": "a", "choices": ["b"], "answer": 1}], 'row 1, column "answer"'),
            ("utility_general", [{"question": "a", "choices": "b", "answer": 0}], 'row 1, column "choices"'),
            ("mia_forget", [{"text": "a"}], 'row 1: no column "subject"'),
        ],
    )
    def test_what_is_wrong_with_a_file_is_said_by_row_and_column(self, folder, file, rows, said):
        write(folder, file, rows)
        with pytest.raises(InvalidRecords, match=said):
            load_data("rwku", source=folder)


@pytest.mark.parametrize("name", ["rwku", "rwku-tiny"])
def test_every_benchmark_is_a_recipe(name):
    made = BENCHMARKS.get(name)
    for model, data in ((None, None), ("gpt2", None), ("gpt2", "jinzhuoran/RWKU")):
        recipe = load_recipe(
            {**made.recipe(model, data), "methods": made.methods(["zero-shot", "npo"], model)}
        )
        assert [item.name for item in recipe.audits or []] == ["rwku", "cost"]
    with pytest.raises(InvalidHyperparameter, match="name one beside the data"):
        made.recipe(None, "jinzhuoran/RWKU")


def test_the_data_set_of_a_recipe_knows_the_first_target(folder):
    parts = pal.split(load_data("rwku", source=folder), pal.by_column("target", "first"))
    assert [item["subject"] for item in parts.forget] == ["Ann Lee"]
