from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from palimpsest.core.errors import EmptyForgetSet, ForgetCoversEverything, InvalidRecipe
from palimpsest.core.records import Records
from palimpsest.core.selection import by_column, by_ids
from palimpsest.core.split import at_the_end, in_turn, split
from palimpsest.parts.checkpoint import load_model
from palimpsest.study.compare import compare
from palimpsest.study.recipe import load_recipe
from palimpsest.study.turns import matrix, turns_of, turns_table
from palimpsest.study.workshop import Workshop
from tests.study.studies import figures, tiny
from tests.study.test_compare import Counting

IN_TURN = tiny(
    forget=["label=3", "label=5", "label=8"],
    methods=["gradient-ascent"],
    in_turn=True,
    training={"epochs": 8, "lr": 0.003},
    seeds=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("turns") / "run"


@pytest.fixture(scope="module")
def finished(folder):
    return compare(IN_TURN, folder, progress=False)


@pytest.fixture
def requests(digits: Records):
    return [split(digits, by_column("label", label), seed=0) for label in (3, 5, 8)]


def test_each_request_is_met_without_the_records_that_are_gone(requests):
    first, second, third = in_turn(requests)
    assert first.forget.ids == requests[0].forget.ids and first.retain.ids == requests[0].retain.ids
    assert set(second.retain.ids) == set(requests[1].retain.ids) - set(first.forget.ids)
    assert set(third.retain.ids) == set(second.retain.ids) - set(third.forget.ids)
    assert third.forgotten_labels == [8]


def test_classes_that_are_gone_are_not_tested(requests):
    turns = in_turn(requests)
    for gone, turn in zip(([], [3], [3, 5]), turns, strict=True):
        for part in (turn.test, turn.holdout):
            assert not np.isin(part.column("label"), gone).any()
    reviewed = at_the_end(turns)
    assert [turn.description for turn in reviewed] == ["label = 3, at the end", "label = 5, at the end"]
    assert set(reviewed[0].test.column("label")) == set(range(10)) - {5, 8}
    assert reviewed[0].retain.ids == turns[-1].retain.ids


def test_a_request_that_asks_for_nothing_more_is_refused(requests):
    with pytest.raises(EmptyForgetSet, match="earlier ones left"):
        in_turn([requests[0], requests[0]])
    rest = replace(requests[1], forget=requests[0].retain, retain=requests[0].forget)
    with pytest.raises(ForgetCoversEverything):
        in_turn([requests[0], rest])


def test_requests_by_id_that_overlap_keep_what_is_new(digits):
    ids = split(digits, by_column("label", 3), seed=0).forget.ids[:4]
    first, second = (split(digits, by_ids(some), seed=0) for some in (ids[:3], ids[1:]))
    assert in_turn([first, second])[1].forget.ids == ids[3:]


def test_a_model_starts_where_the_answer_before_left_it(finished, folder):
    workshop = Workshop(load_recipe(folder / "recipe.yaml"))
    plan = workshop.plan(str(folder / "artifacts"))
    for seed in (0, 1):
        own = [job for job in plan.cells if job.title == "gradient-ascent" and job.seeds["training"] == seed]
        chain, reviews = [job for job in own if not job.review], [job for job in own if job.review]
        assert [job.start for job in chain] == ["", chain[0].key, chain[1].key]
        assert {job.start for job in reviews} == {chain[2].key} and len(reviews) == 2
        assert len({job.needs[0] for job in own}) == 1


def test_the_first_request_is_audited_again_on_the_model_of_the_last(finished, folder):
    (last,) = [
        cell for cell in finished.select("gradient-ascent", "label = 8") if cell.seeds["training"] == 0
    ]
    (again,) = [
        cell
        for cell in finished.select("gradient-ascent", "label = 3, at the end")
        if cell.seeds["training"] == 0
    ]
    workshop = Workshop(load_recipe(folder / "recipe.yaml"))
    model = load_model(folder / "artifacts" / f"{last.key}.safetensors", workshop.network(0))
    records = workshop.splits[0].forget
    right = 0
    for batch in workshop.runtime(0).batches(records, workshop.task):
        right += int((workshop.task.logits(model, batch).argmax(1) == batch["label"]).sum())
    assert again.value("utility.forget_accuracy") == pytest.approx(right / len(records))
    assert again.seconds in (None, 0.0)


def test_retraining_in_turn_forgets_each_class_for_good(finished):
    for item in turns_of(finished):
        if item.label != "retrain":
            continue
        assert item.steps == 3 and not item.failures
        assert abs(item.figures["K in time"][0]) < 0.05 and abs(item.figures["K at the end"][0]) < 0.05
        assert item.figures["re-emergence"][0] < 0.05
        assert item.figures["test last"][0] > 0.8


def test_the_untouched_model_knows_everything_at_every_step(finished):
    cells = [cell for cell in finished.select("original") if cell.seeds["training"] == 0]
    knowledge = matrix(cells, "utility.forget_accuracy")
    assert knowledge.scores.shape == (3, 3)
    assert np.allclose(knowledge.at_their_time, 1) and np.allclose(knowledge.at_the_end, 1)
    assert np.isnan(knowledge.scores[1, 0])


def test_the_table_has_a_row_per_method(finished):
    assert turns_table(finished).row_count == 3


def test_a_study_in_turn_that_lost_a_model_makes_it_again_with_the_same_result(finished, folder):
    before = figures(finished)
    chain = [cell for cell in finished.select("gradient-ascent", "label = 5") if cell.seeds["training"] == 1]
    (folder / "artifacts" / f"{chain[0].key}.safetensors").write_bytes(b"damaged")
    last = [
        cell.key for cell in finished.select("gradient-ascent", "label = 8") if cell.seeds["training"] == 1
    ]
    executor = Counting()
    extended = {**IN_TURN, "methods": ["gradient-ascent", "finetune"]}
    after = figures(compare(extended, folder, progress=False, executor=executor))
    assert {key: after[key] for key in before} == before
    assert last[0] not in {job.key for job in executor.ran}


def test_a_request_after_one_that_failed_says_so(tmp_path, plugins):
    recipe = tiny(
        forget=["label=3", "label=5"], methods=["study-test-diverging"], in_turn=True,
        imports=["tests.study.plugins"],
    )  # fmt: skip
    result = compare(recipe, tmp_path / "run", progress=False)
    first, second, again = result.select("study-test-diverging")
    assert first.status == second.status == again.status == "failed"
    assert "the request before could not be met" in second.reason and first.reason in second.reason
    assert {cell.status for cell in result.select("retrain")} == {"done"}
    repeated = compare(recipe, tmp_path / "run", progress=False, retry=True)
    assert [cell.reason for cell in repeated.select("study-test-diverging")] == [
        cell.reason for cell in result.select("study-test-diverging")
    ]


def test_requests_in_turn_need_the_models_that_are_left():
    with pytest.raises(InvalidRecipe, match="keep_models"):
        load_recipe(tiny(in_turn=True, keep_models=False))


def test_knowledge_that_is_hardly_known_does_not_count_as_coming_back(finished):
    cells = [cell for cell in finished.select("gradient-ascent") if cell.seeds["training"] == 0]
    wide = []
    for cell in cells:
        findings = tuple(
            replace(item, k_low=-1.0, k_high=2.0) if item.key == "utility.forget_accuracy" else item
            for item in cell.report.findings
        )
        wide.append(replace(cell, report=replace(cell.report, findings=findings)))
    assert np.isfinite(matrix(cells, "utility.forget_accuracy").at_the_end).all()
    assert np.isnan(matrix(wide, "utility.forget_accuracy").scores).all()
