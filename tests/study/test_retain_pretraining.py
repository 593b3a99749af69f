"""Studies of continual learning whose network is pretrained on other classes."""

from __future__ import annotations

import json

import pytest

from palimpsest.core.errors import InvalidRecipe, InvalidStream
from palimpsest.study.retain import load_retain_recipe, retain
from palimpsest.study.retain.workshop import RetainWorkshop

RECIPE = {
    "streams": ["class:2x2"],
    "order": "seed",
    "methods": ["finetune", {"name": "rehearsal-free", "settings": {"l2": 0.1}}],
    "model": {"name": "mlp", "settings": {"width": 16}},
    "pretraining": {"classes": 4, "epochs": 3},
    "training": {"epochs": 1, "batch_size": 32},
    "seeds": 2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return retain(RECIPE, tmp_path_factory.mktemp("pretrained"), progress=False)


def test_every_learner_of_a_seed_starts_from_one_encoder_that_knows_other_classes(study):
    assert [cell.status for cell in study.cells] == ["done"] * 4, study.failed
    for seed in (0, 1):
        told = [cell.outcome for cell in study.cells if cell.seed == seed]
        assert told[0]["pretraining"] == told[1]["pretraining"]
        apart = set(told[0]["pretraining"]["classes"])
        assert len(apart) == 4 and not apart & set(told[0]["order"])
        assert told[0]["pretraining"]["accuracy"] > 0.7
    assert len(list((study.folder / "artifacts").glob("*.encoder"))) == 2, "one training per seed"


def test_the_encoder_is_kept_with_the_study_and_read_again(study, tmp_path, monkeypatch):
    recipe = load_retain_recipe(RECIPE)
    place = str(study.folder / "artifacts")
    trained = RetainWorkshop(recipe).encoder(0)
    monkeypatch.setattr("palimpsest.study.retain.workshop.pretrain", None)  # a second training would fail
    kept = RetainWorkshop(recipe).encoder(0, place)
    assert kept.accuracy == trained.accuracy
    assert all((kept.weights[name] == value).all() for name, value in trained.weights.items())


def test_an_extended_study_adds_to_the_same_encoders(study):
    more = {**RECIPE, "methods": [*RECIPE["methods"], "lwf-mc"]}
    result = retain(more, study.folder, progress=False)
    assert [cell.status for cell in result.cells] == ["done"] * 6
    assert [c.outcome for c in result.cells if c.label == "finetune"] == [
        c.outcome for c in study.cells if c.label == "finetune"
    ]


def test_it_is_part_of_what_a_cell_is_and_its_absence_changes_nothing():
    def keys(**changes):
        tree = {key: value for key, value in {**RECIPE, **changes}.items() if value is not None}
        return {job.key for job in RetainWorkshop(load_retain_recipe(tree)).jobs("x")}

    without = load_retain_recipe({**RECIPE, "pretraining": None})
    assert "pretraining" not in without.plain()
    assert not keys() & keys(pretraining={"classes": 4, "epochs": 4})
    assert not keys() & keys(pretraining=None)


def test_no_epochs_leave_the_same_stream_from_scratch():
    recipe = load_retain_recipe(RECIPE, ["pretraining.epochs=0"])
    scratch, pretrained = RetainWorkshop(recipe), RetainWorkshop(load_retain_recipe(RECIPE))
    assert scratch.stream(0, 1).order == pretrained.stream(0, 1).order
    one, other = (shop.run(0, 0, 1).learner.student.model for shop in (scratch, pretrained))
    assert (one.head.weight == other.head.weight).all()
    assert not (one.hidden[0].weight == other.hidden[0].weight).all()


def test_it_can_be_set_on_the_command_line():
    plain = load_retain_recipe({key: value for key, value in RECIPE.items() if key != "pretraining"})
    changed = load_retain_recipe(plain, ["pretraining.classes=[7, 8]", "pretraining.lr=0.3"])
    assert changed.pretraining is not None and changed.pretraining.classes == [7, 8]
    assert RetainWorkshop(changed).apart(0)[0] == (7, 8)
    assert load_retain_recipe(json.loads(json.dumps(changed.plain()))) == changed


@pytest.mark.parametrize(
    ("changes", "problem", "words"),
    [
        ({"pretraining": {"classes": 10}}, InvalidStream, "leave none"),
        ({"pretraining": {"classes": [3, 3]}}, InvalidStream, "once each"),
        ({"pretraining": {"classes": 8}}, InvalidStream, "4|2"),
        ({"streams": ["domain:permuted:2"]}, InvalidRecipe, "streams of classes"),
        ({"pretraining": {"classes": 4, "lr": -1}}, InvalidRecipe, "pretraining"),
        ({"pretraining": {"clases": 4}}, InvalidRecipe, "classes"),
    ],
)
def test_impossible_pretraining_is_refused_before_any_work(tmp_path, changes, problem, words):
    with pytest.raises(problem, match=words):
        retain({**RECIPE, **changes}, tmp_path, progress=False)
    assert not (tmp_path / "artifacts").exists()
