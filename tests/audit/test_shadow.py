"""Bookkeeping of shadow models: coverage, resuming, damage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit.shadow import ShadowPlan, check_coverage, paired_halves, run_shadows, train_shadow
from palimpsest.core.errors import CannotWrite, InvalidAudit, UnreadableCheckpoint
from palimpsest.core.runtime import Runtime
from palimpsest.parts.training import TrainingRecipe


def plan(runs: int = 6, records: int = 10, **facts: object) -> ShadowPlan:
    inside = paired_halves(records, runs, np.random.default_rng(0))
    return ShadowPlan(tuple(f"r{i}" for i in range(records)), inside, facts)


class Work:
    """Scores that depend on the run and on nothing else; can be told to break off."""

    def __init__(self, breaks_at: int | None = None):
        self.done: list[int] = []
        self.breaks_at = breaks_at

    def __call__(self, run: int, inside: np.ndarray) -> dict[str, np.ndarray]:
        if run == self.breaks_at:
            raise KeyboardInterrupt
        self.done.append(run)
        return {"phi": inside * 2.0 + run, "z": np.arange(3.0) * run}


@given(st.integers(2, 40), st.integers(1, 8))
def test_halves_come_in_complementary_pairs(records: int, pairs: int):
    inside = paired_halves(records, 2 * pairs, np.random.default_rng(0))
    assert (inside[0::2] ^ inside[1::2]).all()
    assert (inside.sum(0) == pairs).all()
    assert set(inside.sum(1)) <= {records // 2, records - records // 2}


@pytest.mark.parametrize(("records", "runs"), [(1, 4), (10, 0), (10, 3)])
def test_halves_that_cannot_be_drawn_are_refused(records: int, runs: int):
    with pytest.raises(InvalidAudit, match="even number of runs"):
        paired_halves(records, runs, np.random.default_rng(0))


def test_a_record_with_too_few_models_is_named():
    inside = paired_halves(5, 6, np.random.default_rng(0))
    check_coverage(inside, least=3)
    inside[:, 4] = [True, True, True, True, True, False]
    with pytest.raises(InvalidAudit, match=r"1 have fewer \(positions 4\)"):
        check_coverage(inside)


def test_scores_of_all_runs_are_stacked_in_order():
    found = run_shadows(plan(), Work(), Runtime())
    assert found["phi"].shape == (6, 10) and found["z"].shape == (6, 3)
    np.testing.assert_array_equal(found["z"][:, 1], np.arange(6.0))


def test_a_broken_off_job_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    whole = run_shadows(plan(), Work(), Runtime())
    first = Work(breaks_at=4)
    with pytest.raises(KeyboardInterrupt):
        run_shadows(plan(), first, Runtime(), tmp_path)
    assert first.done == [0, 1, 2, 3]
    second = Work()
    resumed = run_shadows(plan(), second, Runtime(), tmp_path)
    assert second.done == [4, 5]
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values)
    third = Work()
    run_shadows(plan(), third, Runtime(), tmp_path)
    assert third.done == []


def test_runs_of_another_plan_are_refused_before_any_work(tmp_path):
    run_shadows(plan(method="ssd"), Work(), Runtime(), tmp_path)
    work = Work()
    with pytest.raises(InvalidAudit, match="another plan"):
        run_shadows(plan(method="scrub"), work, Runtime(), tmp_path)
    with pytest.raises(InvalidAudit, match="another plan"):
        run_shadows(plan(records=12, method="ssd"), work, Runtime(), tmp_path)
    assert work.done == []


def test_a_damaged_run_is_named_and_not_used(tmp_path):
    run_shadows(plan(), Work(), Runtime(), tmp_path)
    file = tmp_path / "shadow-0002.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    work = Work()
    with pytest.raises(UnreadableCheckpoint, match=r"shadow-0002.*Delete it"):
        run_shadows(plan(), work, Runtime(), tmp_path)
    assert work.done == []


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    taken = tmp_path / "file"
    taken.write_text("here")
    work = Work()
    with pytest.raises(CannotWrite):
        run_shadows(plan(), work, Runtime(), taken)
    assert work.done == []


def test_a_shadow_model_starts_afresh_and_is_decided_by_its_seed(digits_model, class_request, digits_task):
    recipe, records = TrainingRecipe(epochs=1), class_request.forget
    one, two, other = (
        train_shadow(digits_model, records, digits_task, Runtime(seed=seed), recipe).state_dict()
        for seed in (1, 1, 2)
    )
    trained = digits_model.state_dict()
    assert all((one[name] == two[name]).all() for name in one)
    assert all((one[name] != other[name]).any() for name in one)
    assert all((one[name] != trained[name]).any() for name in one)
