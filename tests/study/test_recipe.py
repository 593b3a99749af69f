from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InvalidRecipe
from palimpsest.parts.training import TrainingRecipe
from palimpsest.study.recipe import CONTROL_SEED, Recipe, Training, load_recipe
from palimpsest.study.yaml_text import read_yaml, write_yaml
from tests.study.studies import tiny

settings_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
recipes = st.fixed_dictionaries(
    {
        "name": st.text(max_size=12),
        "forget": st.lists(
            st.sampled_from(["label=3", "fraction=0.1@4", {"not": {"label": [1, "two"]}}, {"ids": ["a"], "name": "one"}]),
            min_size=1,
            max_size=3,
        ),
        "methods": st.lists(
            st.fixed_dictionaries({"name": st.text(min_size=1, max_size=6), "settings": st.dictionaries(st.text(max_size=5), settings_values, max_size=2)}),
            min_size=1,
            max_size=3,
            unique_by=lambda item: repr((item["name"], item["settings"])),
        ),
        "seeds": st.integers(1, 4) | st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
        "training": st.fixed_dictionaries({"lr": st.floats(1e-8, 10), "clip": st.none() | st.floats(0.1, 5)}),
    }
)  # fmt: skip


@given(recipes)
def test_a_recipe_written_as_yaml_reads_back_as_itself(tree):
    try:
        recipe = load_recipe(tree)
    except InvalidRecipe as problem:
        assert "listed twice" in str(problem) or "original" in str(problem)
        return
    assert load_recipe(read_yaml(recipe.to_yaml())) == recipe


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_yaml_in_every_notation(number):
    assert read_yaml(write_yaml({"value": number}))["value"] == number
    assert read_yaml(f"value: {number:e}")["value"] == float(f"{number:e}")


def test_a_minimal_recipe_has_the_documented_defaults():
    recipe = load_recipe({"forget": "label=3", "methods": "ssd"})
    assert (recipe.data.name, recipe.model.name, recipe.controls, recipe.threads) == (
        "digits",
        "small_cnn",
        3,
        1,
    )
    assert [seeds.training for seeds in recipe.seeds] == [0]
    assert recipe.training.recipe() == TrainingRecipe()


def test_the_training_keys_are_those_of_the_training_recipe():
    assert Training().model_dump() == TrainingRecipe().to_dict()


def test_overrides_reach_into_lists_of_one_short_forms_and_settings():
    source = {"forget": "fraction=0.1", "methods": ["ssd", {"name": "finetune", "settings": {"lr": 0.1}}]}
    changes = [
        "forget.fraction=0.05",
        "methods.0.settings.alpha=3e1",
        "methods.1.settings.lr=1e-3",
        "training.epochs=3",
        "seeds=[4, 5]",
        "model.settings.width=8",
        "split.test=0.3",
    ]
    recipe = load_recipe(source, changes)
    assert recipe.forget[0].fraction == 0.05
    assert [method.settings for method in recipe.methods] == [{"alpha": 30.0}, {"lr": 0.001}]
    assert (recipe.training.epochs, recipe.model.settings, recipe.split.test) == (3, {"width": 8}, 0.3)
    assert [seeds.auditing for seeds in recipe.seeds] == [4, 5]
    assert source["forget"] == "fraction=0.1", "the mapping given was changed"


@pytest.mark.parametrize(
    ("change", "suggestion"),
    [
        ("trainin.epochs=3", "Did you mean 'training'?"),
        ("training.epoch=3", "Did you mean 'epochs'?"),
        ("forget.0.lable=3", "Did you mean 'label'?"),
        ("methods.0.setings.alpha=3", "Did you mean 'settings'?"),
        ("split.holdot=0.3", "Did you mean 'holdout'?"),
        ("seeds={trainig: [0]}", "did you mean 'training'"),
        ("zzz=1", "Known:"),
    ],
)
def test_unknown_keys_are_errors_that_name_the_nearest(change, suggestion):
    with pytest.raises(InvalidRecipe) as problem:
        load_recipe({"forget": ["label=3"], "methods": ["ssd"]}, [change])
    assert suggestion in str(problem.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": []},
        {"forget": []},
        {"seeds": 0},
        {"seeds": [1, 1]},
        {"seeds": [-1]},
        {"seeds": [CONTROL_SEED]},
        {"seeds": {"training": [0, 1], "auditing": [0, 1, 2]}},
        {"methods": ["ssd", "ssd"]},
        {"methods": ["ssd", {"name": "ssd", "label": "the same"}]},
        {"methods": [{"name": "ssd", "label": "a"}, {"name": "finetune", "label": "a"}]},
        {"methods": [{"name": "ssd", "label": "original"}]},
        {"audits": ["utility", "utility"]},
        {"controls": 0},
        {"threads": 0},
        {"executor": "moon"},
        {"training": {"optimizer": "newton"}},
        {"forget": {"label": 3, "ids": ["a"]}},
    ],
)
def test_values_out_of_range_are_refused(changes):
    with pytest.raises(InvalidRecipe, match=next(iter(changes))[:4]):
        load_recipe(tiny(**changes))


@pytest.mark.parametrize("change", ["forget", "=3", "methods.7.name=x", "forget.0.label.deeper=1", "name=[a"])
def test_overrides_that_lead_nowhere_are_refused(change):
    with pytest.raises(InvalidRecipe):
        load_recipe({"forget": ["label=3"], "methods": ["ssd"]}, [change])


def test_seeds_can_be_given_for_each_point_apart():
    def triples(seeds):
        return [tuple(item.model_dump().values()) for item in load_recipe(tiny(seeds=seeds)).seeds]

    assert triples(3) == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    assert triples([7]) == [(7, 7, 7)]
    assert triples({"training": [0, 1, 2]}) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert triples({"training": 4, "unlearning": [5, 6], "auditing": [7, 8]}) == [(4, 5, 7), (4, 6, 8)]


@pytest.mark.parametrize(
    ("content", "said"), [("forget: [", "YAML"), ("- a list", "mapping"), ("", "mapping"), ("\udcff", "YAML")]
)
def test_files_that_are_no_recipe_are_refused(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(InvalidRecipe, match=said):
        load_recipe(path)


def test_an_absent_file_and_objects_in_a_mapping_are_refused(tmp_path):
    with pytest.raises(InvalidRecipe, match=r"absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(InvalidRecipe, match="plain data"):
        load_recipe(tiny(name=Recipe))


def test_a_title_names_the_settings_unless_there_is_a_label():
    recipe = load_recipe(
        tiny(
            methods=["ssd", {"name": "ssd", "settings": {"alpha": 3}}, {"name": "finetune", "label": "tuned"}]
        )
    )
    assert [method.title for method in recipe.methods] == ["ssd", "ssd (alpha=3)", "tuned"]
