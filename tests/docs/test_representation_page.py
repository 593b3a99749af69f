"""The page on representations, done as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.docs.code_blocks import blocks

from palimpsest.audit.uuef import UUEF
from palimpsest.study.recipe import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "representation.md"


def test_the_code_of_the_page_runs_and_says_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    setting, cheat, table, lists, downstream = blocks(PAGE, "python")
    exec(setting, names)
    exec(cheat, names)
    assert names["report"].verdict == "suppressed"
    assert names["report"].finding("uuef.forget_cka_to_original").value == pytest.approx(1, abs=1e-9)
    exec(table, names)
    columns = {line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    assert columns <= set(names["table"].columns) and "random" in set(names["table"]["model"])
    exec(lists, names)
    assert len(names["near"]) == 2 and set(names["near"]) <= {0, 2, 4, 6, 8} and len(names["random"]) == 2
    exec(downstream, names)
    assert (tmp_path / "representation.html").stat().st_size > 10_000


def test_the_recipe_of_the_page_is_one():
    [text] = blocks(PAGE, "yaml")
    recipe = load_recipe({"forget": "label=3", "methods": "finetune", **yaml.safe_load(text)})
    [audit] = [item for item in recipe.audits or [] if item.name == "uuef"]
    assert list(UUEF(**audit.settings).downstream) == ["bags and boots"]
