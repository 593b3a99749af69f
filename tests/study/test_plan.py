from __future__ import annotations

import os
import subprocess
import sys

import pytest

from palimpsest.core.errors import UnknownName
from palimpsest.study.fingerprint import code_fingerprint, data_fingerprint
from palimpsest.study.plan import Plan
from palimpsest.study.recipe import load_recipe
from palimpsest.study.workshop import Workshop
from tests.study.studies import tiny


def plan_of(**changes) -> Plan:
    return Workshop(load_recipe(tiny(**changes))).plan("artifacts")


def keys(plan: Plan) -> set[str]:
    return {job.key for job in plan.cells}


def test_cells_are_methods_by_requests_by_seeds_with_the_original_and_retraining_added():
    plan = plan_of(forget=["label=3", "fraction=0.1"], seeds=3, controls=2)
    assert len(plan.cells) == 2 * (2 + 2) * 3
    assert [job.title for job in plan.cells[:12:3]] == ["original", "retrain", "ssd", "finetune"]
    assert len(plan.controls) == 2 * 2
    assert len(keys(plan)) == len(plan.cells)


def test_retraining_is_not_added_twice():
    assert [method.name for method in plan_of(methods=["ssd", "retrain"]).methods] == ["ssd", "retrain"]


def test_requests_on_the_same_training_set_share_their_originals():
    assert len(plan_of(forget=["label=3", "fraction=0.1"], seeds=2).originals) == 2


def test_a_request_that_pins_test_records_to_the_training_set_has_originals_of_its_own():
    shared = Workshop(load_recipe(tiny()))
    held_out = shared.splits[0].parts["test"].ids[0]
    assert len(plan_of(forget=["label=3", f"ids={held_out}"], seeds=2).originals) == 4


def test_no_control_is_trained_with_the_seed_of_a_cell():
    plan = plan_of(seeds=[0, 9999], controls=4)
    used = {seed for job in plan.cells for seed in job.seeds.values()}
    assert not used & {job.seeds["training"] for job in plan.controls}


def test_unlearning_and_auditing_seeds_do_not_train_another_original():
    plan = plan_of(seeds={"unlearning": [0, 1, 2], "auditing": [5, 6, 7]})
    assert len(plan.originals) == 1
    assert len(keys(plan)) == len(plan.cells) == 4 * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "mlp", "settings": {"width": 17, "depth": 1}}},
        {"training": {"epochs": 3}},
        {"split": {"seed": 1}},
        {"split": {"test": 0.25}},
        {"forget": ["label=4"]},
        {"audits": ["utility", "cost"]},
        {"audits": [{"name": "membership", "settings": {"folds": 4}}]},
        {"audits": None},
        {"controls": 2},
        {"threads": 2},
        {"seeds": [5]},
    ],
)
def test_whatever_can_change_a_result_changes_every_key(changes):
    assert not keys(plan_of()) & keys(plan_of(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another"},
        {"workers": 2},
        {"store": "sqlite:///elsewhere"},
        {"keep_models": False},
        {"forget": [{"label": "3", "name": "the threes"}]},
        {"methods": [{"name": "ssd", "label": "damped"}, "finetune"]},
    ],
)
def test_names_and_the_way_it_is_run_change_no_key(changes):
    assert keys(plan_of()) == keys(plan_of(**changes))


def test_a_setting_changes_the_keys_of_its_method_only():
    before, after = plan_of(), plan_of(methods=[{"name": "ssd", "settings": {"alpha": 3}}, "finetune"])
    changed = [job.title for job in before.cells if job.key not in keys(after)]
    assert changed == ["ssd"]


def test_keys_are_the_same_in_another_process(tmp_path):
    program = (
        "from tests.study.test_plan import plan_of\n"
        "print(sorted(job.key for job in plan_of(forget=['label=3', 'fraction=0.1'], seeds=2).cells))"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    here = str(sorted(keys(plan_of(forget=["label=3", "fraction=0.1"], seeds=2))))
    assert printed == [here, here]


def test_the_bytes_of_the_data_are_part_of_the_keys(digits):
    moved = digits.with_column("subject", [f"p{index}" for index in range(len(digits))])
    assert data_fingerprint(digits) == data_fingerprint(digits)
    assert data_fingerprint(digits) != data_fingerprint(moved)
    assert data_fingerprint(digits) != data_fingerprint(digits.select(range(1, len(digits))))
    brighter = digits.tensors["input"].clone()
    brighter[17, 0, 3, 3] += 1e-6
    from torch.utils.data import TensorDataset

    from palimpsest.core.records import Records

    changed = Records(TensorDataset(brighter, digits.tensors["label"]), ids=digits.ids)
    assert data_fingerprint(digits) != data_fingerprint(changed)


def test_the_source_of_a_third_partys_method_is_part_of_its_keys(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for body in ("return 1", "return 2"):
        (tmp_path / "third_party_of_a_test.py").write_text(
            f"class Method:\n    def unlearn(self):\n        {body}\n"
        )
        importlib.invalidate_caches()
        sys.modules.pop("third_party_of_a_test", None)
        prints.append(code_fingerprint(importlib.import_module("third_party_of_a_test").Method))
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"methods": ["sdd"]}, "ssd"),
        ({"audits": ["utilty"]}, "utility"),
        ({"model": "small_cn"}, "small_cnn"),
        ({"data": "digit"}, "digits"),
    ],
)
def test_unknown_names_suggest_the_nearest(changes, nearest):
    with pytest.raises(UnknownName, match=f"Did you mean '{nearest}'"):
        plan_of(**changes)
