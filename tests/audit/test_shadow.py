"""Shadow models as artifacts: coverage, content hashes, resuming, sharing, damage."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import palimpsest as pal
from palimpsest.audit import shadow
from palimpsest.audit.shadow import ShadowStudy, check_coverage, paired_halves, train_shadow
from palimpsest.core.errors import CannotWrite, InvalidAudit, UnreadableCheckpoint
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.unlearner import unlearner
from palimpsest.models import build_model
from palimpsest.parts.training import TrainingRecipe

ROOT = Path(__file__).parents[2]
RECIPE = TrainingRecipe(epochs=1)
HALVES = paired_halves(40, 6, np.random.default_rng(0))


def study(folder: Path, **changes) -> ShadowStudy:
    """Shadow models on 40 digits."""
    records = pal.load_data("digits").select(np.arange(60))
    base = build_model("mlp", (1, 8, 8), 10, seed=0, width=8)
    made = ShadowStudy(
        base,
        records.select(np.arange(40)),
        records,
        pal.tasks.Classification(),
        Runtime(threads=1),
        RECIPE,
        folder,
    )
    return replace(made, **changes)


def models_of(made: ShadowStudy, runs: int = 6) -> list[shadow.ShadowModel]:
    return [made.trained(np.flatnonzero(row), seed) for seed, row in enumerate(HALVES[:runs])]


@pytest.fixture
def trainings(monkeypatch):
    """Training runs made in this process, by number of records; can be told to break off."""
    done: list[int] = []
    limit = [10**6]

    def counted(model, records, task, runtime, recipe):
        if len(done) == limit[0]:
            raise KeyboardInterrupt
        done.append(len(records))
        return fit(model, records, task, runtime, recipe)

    fit = shadow.fit
    monkeypatch.setattr(shadow, "fit", counted)
    done_and_limit = done, limit
    return done_and_limit


@given(st.integers(2, 40), st.integers(1, 8))
def test_halves_come_in_complementary_pairs(records: int, pairs: int):
    inside = paired_halves(records, 2 * pairs, np.random.default_rng(0))
    assert (inside[0::2] ^ inside[1::2]).all()
    assert (inside.sum(0) == pairs).all()
    assert set(inside.sum(1)) <= {records // 2, records - records // 2}


def test_more_runs_begin_with_the_same_pairs():
    few, many = (paired_halves(30, runs, np.random.default_rng(1)) for runs in (4, 10))
    np.testing.assert_array_equal(few, many[:4])


@pytest.mark.parametrize(("records", "runs"), [(1, 2), (10, 0), (10, 3)])
def test_impossible_halves_are_refused(records: int, runs: int):
    with pytest.raises(InvalidAudit, match="even number of runs"):
        paired_halves(records, runs, np.random.default_rng(0))


def test_a_record_without_enough_models_on_a_side_is_named():
    inside = paired_halves(10, 6, np.random.default_rng(0)).copy()
    check_coverage(inside, least=3)
    inside[:, 7] = True
    with pytest.raises(InvalidAudit, match="positions 7"):
        check_coverage(inside)


def test_a_broken_off_study_goes_on_and_ends_as_an_undisturbed_one(tmp_path, trainings):
    done, limit = trainings
    whole, broken = study(tmp_path / "whole"), study(tmp_path / "broken")
    assert whole.make(models_of(whole)) == 6
    limit[0] = len(done) + 4
    with pytest.raises(KeyboardInterrupt):
        broken.make(models_of(broken))
    limit[0] = 10**6
    assert broken.make(models_of(broken)) == 2
    assert len(done) == 6 + 4 + 2
    for model in models_of(whole):
        np.testing.assert_array_equal(whole.seen(model).phi, broken.seen(model).phi)
    assert broken.make(models_of(broken)) == 0


def test_a_study_killed_in_another_process_goes_on_here(tmp_path, trainings):
    code = "import sys, time\nfrom pathlib import Path\nfrom tests.audit import test_shadow as t\n"
    code += "made = t.study(Path(sys.argv[1]))\nfit = t.shadow.fit\n"
    code += "t.shadow.fit = lambda *a: fit(*a) if len(list(Path(sys.argv[1]).glob('*.json'))) < 3 else time.sleep(99)\n"
    code += "made.make(t.models_of(made))\n"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.json"))) < 3 and time.monotonic() < deadline and other.poll() is None:
        time.sleep(0.05)
    other.kill()
    other.wait()
    mine = study(tmp_path)
    assert mine.make(models_of(mine)) == 3
    assert len(trainings[0]) == 3


def test_a_larger_study_adds_to_what_is_there(tmp_path, trainings):
    mine = study(tmp_path)
    assert mine.make(models_of(mine, 4)) == 4
    assert mine.make(models_of(mine, 6)) == 2


def test_a_model_is_another_one_if_anything_that_it_comes_from_differs(tmp_path):
    plain = study(tmp_path)
    records = np.arange(20)
    key = plain.trained(records, 0).key
    assert study(tmp_path / "elsewhere", workers=2).trained(records, 0).key == key
    other_base = build_model("mlp", (1, 8, 8), 10, seed=5, width=8)
    assert study(tmp_path, base=other_base).trained(records, 0).key == key
    wider = build_model("mlp", (1, 8, 8), 10, seed=0, width=9)
    relabelled = plain.pool.tensors["label"].clone()
    relabelled[3] = (relabelled[3] + 1) % 10
    pool = pal.Records(
        torch.utils.data.TensorDataset(plain.pool.tensors["input"], relabelled), ids=plain.pool.ids
    )
    others = [
        plain.trained(records, 1),
        plain.trained(np.arange(1, 21), 0),
        study(tmp_path, recipe=TrainingRecipe(epochs=2)).trained(records, 0),
        study(tmp_path, base=wider).trained(records, 0),
        study(tmp_path, pool=pool).trained(records, 0),
    ]
    assert len({key, *(model.key for model in others)}) == 6
    assert (
        study(tmp_path, pool=pool).trained(np.arange(4, 20), 0).key == plain.trained(np.arange(4, 20), 0).key
    )


def test_worker_processes_make_the_same_models(tmp_path):
    here, there = study(tmp_path / "here"), study(tmp_path / "there", workers=2)
    here.make(models_of(here, 4))
    assert there.make(models_of(there, 4)) == 4
    for model in models_of(here, 4):
        np.testing.assert_array_equal(here.seen(model).phi, there.seen(model).phi)


def test_what_another_process_is_making_is_waited_for_and_not_made_twice(tmp_path, trainings):
    mine = study(tmp_path)
    models = models_of(mine)
    fcntl = pytest.importorskip("fcntl")
    theirs = (tmp_path / f"{models[1].key}.lock").open("w")
    fcntl.flock(theirs, fcntl.LOCK_EX)
    threading.Timer(1.0, theirs.close).start()
    assert mine.make(models) == 6
    assert trainings[0] == [int(HALVES[run].sum()) for run in (0, 2, 3, 4, 5, 1)]


def test_every_artifact_says_what_it_is_and_holds_no_pickle(tmp_path):
    mine = study(tmp_path)
    models = models_of(mine, 2)
    mine.make(models)
    assert {place.suffix for place in tmp_path.iterdir()} == {".json", ".safetensors"}
    note = json.loads((tmp_path / f"{models[0].key}.json").read_text())
    assert note["kind"] == "trained" and note["architecture"] == "MLP" and note["records"] == 20
    assert note["recipe"]["epochs"] == 1 and len(note["sha256"]) == 64


def test_a_damaged_or_changed_model_is_named_before_any_work_and_not_used(tmp_path, trainings):
    mine = study(tmp_path)
    models = models_of(mine, 2)
    mine.make(models)
    place = tmp_path / f"{models[1].key}.safetensors"
    whole = place.read_bytes()
    for bad in (whole[:40], whole[:-1] + b"\x01"):
        place.write_bytes(bad)
        with pytest.raises(UnreadableCheckpoint, match=rf"{models[1].key}.*Delete it"):
            mine.make(models_of(mine))
        with pytest.raises(UnreadableCheckpoint):
            mine.seen(models[1])
    assert len(trainings[0]) == 2
    place.unlink()
    assert mine.make(models_of(mine)) == 5


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, trainings):
    taken = tmp_path / "file"
    taken.write_text("here")
    with pytest.raises(CannotWrite):
        study(taken).make(models_of(study(taken)))
    assert trainings[0] == []


@unlearner("test-shadow-wrapper", needs={Need.MODEL})
@dataclass(frozen=True)
class Wrapper:
    """Return a model of another class that answers upside down."""

    scale: float = -1.0

    def unlearn(self, model, split, task, runtime):
        class Upside(nn.Module):
            def __init__(self, inner: nn.Module, scale: float):
                super().__init__()
                self.inner, self.scale = inner, scale

            def forward(self, x):
                return self.scale * self.inner(x)

        assert runtime.seed == 7 and len(split.forget) == 5
        return Upside(model, self.scale)


def test_what_a_method_makes_of_a_shadow_model_is_kept_as_scores_whatever_its_class(tmp_path):
    mine = study(tmp_path)
    [start] = models_of(mine, 1)
    mine.make([start])
    after = mine.forgetting(start, start.records[:5], Wrapper(), seed=7)
    assert mine.make([after], Wrapper()) == 1 and mine.make([after], Wrapper()) == 0
    flipped = study(tmp_path).forgetting(start, start.records[:5], Wrapper(scale=1.0), seed=7)
    assert flipped.key != after.key
    mine.make([flipped], Wrapper(scale=1.0))
    np.testing.assert_allclose(mine.seen(flipped).phi, mine.seen(start).phi, rtol=1e-6)
    assert (mine.seen(after).phi != mine.seen(start).phi).mean() > 0.9


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_networks_of_the_users_own_become_shadow_models_and_stay_as_they_are(name: str, tmp_path):
    pytest.importorskip(name.partition(":")[0])
    images = torch.rand(12, 3, 32, 32)
    records = pal.Records(torch.utils.data.TensorDataset(images, torch.arange(12) % 3))
    settings = {"img_size": 32} if name.startswith("timm") else {}
    base = build_model(name, (3, 32, 32), 3, seed=0, **settings)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    mine = study(tmp_path, base=base, pool=records, watched=records)
    model = mine.trained(np.arange(8), 0)
    mine.make([model])
    assert np.isfinite(mine.seen(model).phi).all()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_shadow_model_starts_afresh_and_is_decided_by_its_seed(digits_task):
    base, records = build_model("mlp", (1, 8, 8), 10, seed=0, width=8), study(Path()).pool
    one, two, other = (
        train_shadow(base, records, digits_task, Runtime(seed=seed), RECIPE).state_dict()
        for seed in (1, 1, 2)
    )
    trained = base.state_dict()
    assert all((one[name] == two[name]).all() for name in one)
    assert all((one[name] != other[name]).any() for name in one)
    assert all((one[name] != trained[name]).any() for name in one)
