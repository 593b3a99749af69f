from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palimpsest.core.errors import (
    AbsentClass,
    CannotWrite,
    InvalidHyperparameter,
    InvalidRecipe,
    MissingNeed,
    ModelMismatch,
    RunLocked,
    UnknownName,
)
from palimpsest.parts.checkpoint import load_model, read_checkpoint
from palimpsest.study.compare import compare, open_run
from palimpsest.study.executors import LocalExecutor
from palimpsest.study.folder import locked
from palimpsest.study.plan import Job
from palimpsest.study.result import StudyResult
from palimpsest.study.store import Store
from palimpsest.study.tables import ArtifactRow
from palimpsest.study.workshop import Worker, Workshop
from tests.study.studies import figures, tiny

TWO_REQUESTS = tiny(
    forget=["label=3", "fraction=0.1"],
    seeds=2,
    controls=2,
    audits=["utility", "cost"],
    training={"epochs": 8},
)


class Counting(LocalExecutor):
    """The local executor, noting what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Job] = []

    def run(self, jobs):
        self.ran += jobs
        return super().run(jobs)


def run(folder: Path, recipe=None, **options) -> tuple[StudyResult, list[Job]]:
    """A study's result and the jobs that were run for it."""
    executor = Counting()
    result = compare(recipe or tiny(), folder, progress=False, executor=executor, **options)
    return result, executor.ran


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, StudyResult]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, compare(TWO_REQUESTS, folder, progress=False)


def test_a_study_has_a_report_for_every_method_request_and_seed(finished):
    folder, result = finished
    assert len(result.cells) == 2 * 4 * 2
    assert {cell.status for cell in result.cells} == {"done"}
    for cell in result.cells:
        facts = cell.report.facts
        assert (facts["method"], facts["label"], facts["request"]) == (cell.method, cell.label, cell.request)
        assert facts["seeds"] == cell.seeds and facts["controls"] == 2
        assert cell.peak_bytes is None or cell.peak_bytes > 2**20
    assert (folder / "recipe.yaml").is_file() and (folder / "study.sqlite").is_file()


def test_untouched_and_retrained_models_bracket_the_methods(finished):
    _, result = finished
    class_request = "label = 3"
    for cell in result.select("original", class_request):
        assert cell.report.verdict == "intact"
        assert cell.k("utility.forget_probability") == pytest.approx(1)
    for cell in result.select("retrain", class_request):
        assert cell.value("utility.forget_accuracy") <= 0.02
    for cell in result.select("original"):
        assert cell.seconds == cell.share == 0


def test_the_share_of_retraining_is_that_of_the_mean_control(finished):
    folder, result = finished
    store = Store(f"sqlite:///{folder / 'study.sqlite'}")
    workshop = Workshop(open_recipe(folder))
    for request in (0, 1):
        controls = [job.key for job in workshop.plan("").controls if job.request == request]
        times = [row.seconds for row in store.artifacts(controls).values()]
        assert len(times) == 2
        for cell in result.select("finetune", workshop.splits[request].description):
            assert cell.share == pytest.approx(cell.seconds / (sum(times) / 2))
    store.close()


def open_recipe(folder: Path):
    from palimpsest.study.recipe import load_recipe

    return load_recipe(folder / "recipe.yaml")


def test_the_retrained_row_is_none_of_its_own_controls(finished):
    folder, _ = finished
    plan = Workshop(open_recipe(folder)).plan(str(folder / "artifacts"))
    weights = {
        job.key: read_checkpoint(folder / "artifacts" / f"{job.key}.safetensors").weights
        for job in [*plan.controls, *(job for job in plan.cells if plan.method_name(job) == "retrain")]
    }
    values = [tensors["head.weight"] for tensors in weights.values()]
    assert len(values) == 2 * 2 + 2 * 2
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_kept_models_are_the_ones_that_were_audited(finished):
    folder, result = finished
    workshop = Workshop(open_recipe(folder))
    cell = result.select("ssd", "label = 3")[1]
    model = load_model(folder / "artifacts" / f"{cell.key}.safetensors", workshop.network(0))
    test = workshop.splits[0].parts["test"]
    kept = test.column("label") != 3
    predicted = model(test.tensors["input"]).argmax(1).numpy()
    assert (predicted == test.column("label"))[kept].mean() == pytest.approx(
        cell.value("utility.test_accuracy")
    )
    store = Store(f"sqlite:///{folder / 'study.sqlite'}")
    row: ArtifactRow = store.artifacts([cell.key])[cell.key]
    assert row.kind == "unlearned" and row.sha256 == read_checkpoint(row.place).sha256
    store.close()


def test_a_finished_study_runs_nothing_and_says_the_same(finished):
    folder, result = finished
    again, ran = run(folder, TWO_REQUESTS)
    assert ran == []
    assert figures(again) == figures(result) == figures(open_run(folder))
    assert again.to_dict() == result.to_dict()


def test_frame_table_and_json_show_every_cell(finished, tmp_path):
    from rich.console import Console

    _, result = finished
    frame = result.to_frame()
    assert len(frame) == len(result.cells)
    assert frame["test"].between(0, 1).all()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result.table())
    shown = console.export_text()
    for word in ("label = 3", "finetune", "retrain", "original", "share of"):
        assert word in shown
    stored = json.loads(result.save(tmp_path / "result.json").read_text())
    assert [cell["key"] for cell in stored["cells"]] == [cell.key for cell in result.cells]
    assert len(stored["summary"]) == 2 * 4


def test_worker_processes_find_the_same_as_this_process(finished, tmp_path):
    _, result = finished
    assert figures(compare(TWO_REQUESTS, tmp_path / "run", workers=2, progress=False)) == figures(result)


def test_an_extended_study_runs_only_what_is_new(tmp_path):
    run(tmp_path, tiny())
    more = tiny(methods=["ssd", "finetune", {"name": "ssd", "settings": {"alpha": 3}}], seeds=2)
    result, ran = run(tmp_path, more)
    assert len(result.cells) == 5 * 2
    assert sorted(job.title for job in ran) == sorted(
        ["original", "ssd (alpha=3)", "original", "retrain", "ssd", "finetune", "ssd (alpha=3)"]
    )
    fewer, ran = run(tmp_path, tiny(name="renamed"))
    assert ran == [] and len(fewer.cells) == 4
    assert fewer.reports[0].facts["study"] == "renamed"


def test_another_study_in_the_same_folder_is_refused_and_nothing_is_touched(tmp_path):
    run(tmp_path, tiny())
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and "sqlite" not in path.name
    }
    for changes, said in (
        ({"training": {"epochs": 3}}, "training"),
        ({"forget": ["label=4"]}, "label"),
        ({"methods": ["ssd", "gradient-ascent"]}, "gradient-ascent"),
    ):
        with pytest.raises(InvalidRecipe, match="another study") as problem:
            run(tmp_path, tiny(**changes))
        assert said in str(problem.value)
    assert before == {path: path.read_bytes() for path in before}


def test_damaged_or_missing_weights_are_trained_again_with_the_same_outcome(tmp_path):
    whole, _ = run(tmp_path / "whole", tiny(seeds=2))
    run(tmp_path / "hurt", tiny(seeds=1))
    weights = sorted((tmp_path / "hurt" / "artifacts").glob("*.safetensors"))
    first_run = {path.name: path.read_bytes() for path in weights}
    for number, path in enumerate(weights):
        content = bytearray(path.read_bytes())
        content[-20] ^= 0xFF
        path.write_bytes(bytes(content)) if number % 3 == 0 else path.write_bytes(content[:-7])
        if number % 3 == 2:
            path.unlink()
    mended, ran = run(tmp_path / "hurt", tiny(seeds=2))
    assert {job.kind for job in ran} == {"original", "control", "cell"}
    assert figures(mended) == figures(whole)
    needed = {key for job in ran if job.kind == "cell" for key in job.needs}
    for key in needed & {name.partition(".")[0] for name in first_run}:
        assert (tmp_path / "hurt" / "artifacts" / f"{key}.safetensors").read_bytes() == first_run[
            f"{key}.safetensors"
        ]


def test_weights_swapped_under_a_running_study_are_noticed(tmp_path):
    recipe = tiny()

    class Swapping(Counting):
        def run(self, jobs):
            for job in jobs:
                if job.kind == "cell":
                    for path in (tmp_path / "artifacts").glob("*.safetensors"):
                        path.write_bytes(path.read_bytes()[:-1])
            yield from super().run(jobs)

    result = compare(recipe, tmp_path, progress=False, executor=Swapping())
    assert {cell.status for cell in result.cells} == {"crashed"}
    healed, _ = run(tmp_path, recipe)
    assert {cell.status for cell in healed.cells} == {"done"}


def test_a_diverging_or_buggy_method_stops_its_cells_only(tmp_path, plugins):
    recipe = tiny(methods=["study-test-diverging", "ssd", "study-test-buggy"], seeds=2)
    result, _ = run(tmp_path, recipe)
    by_label = {
        label: {cell.status for cell in result.select(label)} for label in ("ssd", "retrain", "original")
    }
    assert by_label == {label: {"done"} for label in by_label}
    for cell in result.select("study-test-diverging"):
        assert cell.status == "failed" and cell.reason.startswith("NonFiniteLoss") and cell.report is None
    for cell in result.select("study-test-buggy"):
        assert (
            cell.status == "crashed" and cell.reason == "KeyError: 'absent'" and "plugins.py" in cell.detail
        )
    assert len(result.failures) == 4
    failed = {item.label: item.failures for item in result.summary()}
    assert len(failed["study-test-diverging"]) == 2 and failed["ssd"] == []

    again, ran = run(tmp_path, recipe)
    assert {job.title for job in ran} == {"study-test-buggy"}
    assert figures(again) == figures(result)
    _, ran = run(tmp_path, recipe, retry=True)
    assert {job.title for job in ran} == {"study-test-buggy", "study-test-diverging"}


def test_an_original_that_cannot_be_trained_fails_its_cells_with_the_reason(tmp_path):
    result, _ = run(tmp_path, tiny(training={"epochs": 2, "lr": 1e30, "optimizer": "sgd"}))
    assert {cell.status for cell in result.cells} == {"failed"}
    assert all("could not be trained: NonFiniteLoss" in cell.reason for cell in result.cells)


def test_a_method_whose_worker_is_killed_does_not_stop_the_others(tmp_path, plugins):
    def dying(times: int, name: str) -> dict:
        settings = {"tally": str(tmp_path / name), "times": times}
        return {"name": "study-test-dying", "label": name, "settings": settings}

    recipe = tiny(methods=["ssd", dying(1, "once"), dying(99, "always")])
    result = compare(recipe, tmp_path / "run", workers=2, progress=False)
    assert {cell.label: cell.status for cell in result.cells} == {
        "original": "done", "retrain": "done", "ssd": "done", "once": "done", "always": "crashed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"methods": ["sdd"]}, UnknownName, "ssd"),
        ({"methods": [{"name": "ssd", "settings": {"alpa": 3}}]}, UnknownName, "alpha"),
        ({"methods": [{"name": "ssd", "settings": {"alpha": -1}}]}, InvalidHyperparameter, "alpha"),
        ({"methods": ["study-test-picky"]}, MissingNeed, "reference-model"),
        ({"audits": ["utilty"]}, UnknownName, "utility"),
        ({"audits": [{"name": "membership", "settings": {"fold": 3}}]}, UnknownName, "folds"),
        ({"model": "small_cn"}, UnknownName, "small_cnn"),
        ({"model": {"name": "mlp", "settings": {"wide": 3}}}, InvalidHyperparameter, "wide"),
        ({"data": "digitz"}, UnknownName, "digits"),
        ({"forget": ["label=11"]}, AbsentClass, "11"),
        ({"forget": ["subject=p1"]}, UnknownName, "subject"),
        ({"forget": [{"fraction": 0.1}, {"any": [{"fraction": 0.1}]}]}, InvalidRecipe, "called"),
        ({"training": {"epochs": 0}}, InvalidHyperparameter, "epochs"),
        ({"device": "quantum"}, InvalidRecipe, "quantum"),
        ({"imports": ["no_such_module"]}, InvalidRecipe, "no_such_module"),
        ({"model": "palimpsest.study.compare:compare"}, (InvalidHyperparameter, ModelMismatch), "Model"),
        ({"typo": 1}, InvalidRecipe, "typo"),
    ],
)
def test_bad_input_is_found_before_any_work(tmp_path, plugins, changes, error, said):
    with pytest.raises(error, match=said):
        compare(tiny(**changes), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_regular_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotWrite, match="file"):
        compare(tiny(), tmp_path / "file" / "run", progress=False)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_second_process_can_be_told_not_to_wait(tmp_path):
    from rich.console import Console

    with locked(tmp_path, True, Console(quiet=True)), pytest.raises(RunLocked, match=str(tmp_path)):
        compare(tiny(), tmp_path, progress=False, wait=False)


TWO = """
import json, sys
from palimpsest.study.compare import compare
from tests.study.studies import figures, tiny
print(json.dumps(figures(compare(tiny(seeds=3), sys.argv[1], progress=False))))
"""


def test_two_processes_on_one_folder_end_with_one_and_the_same_result(tmp_path):
    both = [
        subprocess.Popen([sys.executable, "-c", TWO, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=300)[0]) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    alone, _ = run(tmp_path / "alone", tiny(seeds=3))
    assert first == second == json.loads(json.dumps(figures(alone)))


@pytest.mark.postgres
def test_a_study_in_postgresql_finds_the_same_as_one_in_a_file(tmp_path, postgres):
    here, _ = run(tmp_path / "here", tiny(seeds=2))
    there, _ = run(tmp_path / "there", tiny(seeds=2, store=postgres))
    assert figures(there) == figures(here)
    again, ran = run(tmp_path / "elsewhere", tiny(seeds=2, store=postgres))
    assert ran == [] and figures(again) == figures(here)
    assert not (tmp_path / "there" / "study.sqlite").exists()


def test_weights_may_lie_behind_an_fsspec_url(tmp_path):
    result, _ = run(tmp_path / "run", tiny(artifacts="memory://weights-of-a-test"))
    local, _ = run(tmp_path / "local", tiny())
    assert figures(result) == figures(local)
    assert not (tmp_path / "run" / "artifacts").exists()
    _, ran = run(tmp_path / "run", tiny(artifacts="memory://weights-of-a-test", seeds=2))
    assert sum(job.kind != "cell" for job in ran) == 1


def test_a_folder_without_a_study_is_a_clear_error(tmp_path):
    with pytest.raises(InvalidRecipe, match="no study"):
        open_run(tmp_path)


def test_a_worker_keeps_nothing_that_changes_a_result(tmp_path):
    """Cells in another order, each in a fresh worker, find what they find in a row."""
    recipe = tiny(
        methods=["ssd", "finetune", "gradient-ascent"], audits=["utility", "membership", "relearning"]
    )
    executor = Counting()
    compare(recipe, tmp_path, progress=False, executor=executor)
    cells = [job for job in executor.ran if job.kind == "cell"]
    in_a_row, alone = Worker(), {job.key: Worker()(job) for job in reversed(cells)}
    for job in cells:
        kept, fresh = in_a_row(job), alone[job.key]
        drop = [item for item in kept.report["findings"] if item["audit"] != "cost"]
        assert drop == [item for item in fresh.report["findings"] if item["audit"] != "cost"]
        assert kept.sha256 == fresh.sha256
