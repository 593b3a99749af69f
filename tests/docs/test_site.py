"""The site: it builds without a warning, is complete, and asks nothing of the network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.core.auditing import AUDITS
from palimpsest.core.unlearner import UNLEARNERS

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("material")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def builder():
    found = importlib.util.spec_from_file_location("build_pages", ROOT / "docs" / "build_pages.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_method_and_audit_has_a_page_that_is_linked(site):
    for folder, registry in (("methods", UNLEARNERS), ("audits", AUDITS)):
        index = (site / folder / "index.html").read_text()
        for name, cls in registry.items():
            if cls.__module__.startswith(("palimpsest.forget.", "palimpsest.audit.")):
                assert f'href="{name}.html"' in index
                assert f">{name}" in (site / folder / f"{name}.html").read_text()


def test_every_learner_has_a_page_with_its_settings(builder):
    from palimpsest.retain.learner import LEARNERS

    pages = builder.generated_pages()
    for name, cls in LEARNERS.items():
        if cls.__module__.startswith("palimpsest.retain."):
            assert f"[`{name}`]({name}.md)" in pages["learners/index.md"]
            assert all(f"`{field}`" in pages[f"learners/{name}.md"] for field in cls.__dataclass_fields__)


def test_no_mark_is_left_unfilled(site):
    for page in site.rglob("*.html"):
        assert "<!-- fill" not in page.read_text()


def test_pages_load_nothing_from_elsewhere(site):
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=[\"']?(https?:)?//|<link[^>]+rel=\"?(?:stylesheet|preconnect)[^>]+https?://"
    )
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page


def test_the_page_of_a_method_shows_paper_needs_and_hyperparameters(builder):
    page = builder.method_page("ssd", UNLEARNERS.get("ssd"))
    assert "[Fast Machine Unlearning Without Retraining" in page and "arxiv.org/abs/2308.07707" in page
    assert "model, forget-data, forget-labels, retain-data, retain-labels" in page
    assert "| `alpha` | `float` | `10.0` | Selection weighting, above 0. |" in page
    assert "Attributes:" not in page


def test_thresholds_are_those_of_the_code(builder):
    from palimpsest.audit import verdict
    from palimpsest.core import scale

    for module in (verdict, scale):
        table = builder.thresholds(module.__name__)
        names = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE)
        assert names
        assert all(float(value) == pytest.approx(getattr(module, name)) for name, value in names)
    assert {"DAMAGE", "FORGOTTEN", "KNOWN", "UNTOUCHED"} <= set(
        re.findall(r"`(\w+)`", builder.thresholds(verdict.__name__))
    )


def test_the_command_line_is_documented_verb_by_verb(builder):
    page = builder.cli_page()
    for verb in ("compare", "forget", "audit", "report", "methods", "audits", "advise", "replicate"):
        assert f"## `palimpsest {verb}`" in page
    assert "--set KEY=VALUE" in page


def test_results_are_shown_as_they_were_written(builder, tmp_path):
    claim = {
        "name": "first", "statement": "it forgets", "paper": "1.0", "note": "tried twice", "ours": "0.9",
        "held": 2, "units": 3, "needed": 1.0, "passed": False, "figures": [],
    }  # fmt: skip
    result = {
        "slug": "own", "paper": {"title": "A paper", "venue": "V", "arxiv": None}, "setting": "small", "seeds": 3,
        "seconds": 1.5, "passed": False, "versions": {"torch": "2"}, "claims": [claim],
    }  # fmt: skip
    file = tmp_path / "results" / "own.json"
    file.parent.mkdir()
    file.write_text(json.dumps(result))
    page = builder.results_page([file])
    assert "| it forgets | 1.0 | 0.9 | 2 of 3 | **does not hold** |" in page and "tried twice" in page
    (tmp_path / "own.yaml").write_text('claims: [{name: first, note: "tried thrice since"}]')
    assert "tried thrice since" in builder.results_page([file])


def test_every_claim_that_does_not_hold_has_a_note(builder):
    for file in builder.RESULTS.glob("*.json"):
        page = builder.results_page([file])
        for claim in json.loads(file.read_text())["claims"]:
            assert claim["passed"] or f"- *{claim['name']}*: " in page, (file.stem, claim["name"])


def test_results_of_replications_are_on_the_page(builder):
    page = builder.results_page(sorted(builder.RESULTS.glob("*.json")))
    for recipe in (ROOT / "replications").glob("*.yaml"):
        assert f"## {recipe.stem}" in page or f"`{recipe.stem}`" in page
