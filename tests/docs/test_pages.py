"""What the pages tell a reader to do, done."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tests.docs.code_blocks import blocks

import palimpsest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("palimpsest")


def _do(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "palimpsest"
    return subprocess.run(
        [PROGRAM, *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
    )


def _method(folder: Path) -> str:
    """The method file of CONTRIBUTING, written as told; gives the command that runs it."""
    [code] = blocks(ROOT / "CONTRIBUTING.md", "python", "shrink_head.py")
    (folder / "shrink_head.py").write_text(code)
    return next(
        line
        for block in blocks(ROOT / "CONTRIBUTING.md", "bash")
        for line in block.splitlines()
        if "shrink_head" in line
    )


def _verdicts(folder: Path) -> dict[str, str]:
    stored = json.loads((folder / "results.json").read_text())
    assert not [cell for cell in stored["cells"] if cell["status"] != "done"]
    return {cell["label"]: cell["report"]["verdict"] for cell in stored["cells"]}


def test_the_method_of_contributing_runs_in_compare_as_told(tmp_path):
    done = _do(_method(tmp_path) + " --no-report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "shrink-head" in done.stdout
    assert set(_verdicts(tmp_path / "runs" / "shrink-head")) == {
        "original",
        "retrain",
        "shrink-head",
        "finetune",
    }


def test_the_method_of_contributing_is_known_by_its_entry_point(tmp_path):
    command = _method(tmp_path).replace("--import shrink_head ", "")
    assert "--import" not in command
    unknown = _do(command, tmp_path)
    assert unknown.returncode == 2 and "Unknown method 'shrink-head'" in unknown.stderr
    [declared] = blocks(ROOT / "CONTRIBUTING.md", "toml", "pyproject.toml")
    entries = tomllib.loads(declared)["project"]["entry-points"]
    about = tmp_path / "shrink_head-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shrink-head\nVersion: 0.1\n")
    lines = [
        line
        for group, names in entries.items()
        for line in (f"[{group}]", *(f"{n} = {t}" for n, t in names.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    done = _do(command + " --no-report", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "shrink-head" in _verdicts(tmp_path / "runs" / "shrink-head")


def test_the_audit_of_the_guide_runs_in_compare_as_told(tmp_path):
    page = ROOT / "docs" / "guide" / "add-an-audit.md"
    [code], [command] = blocks(page, "python", "margin.py"), blocks(page, "bash")
    (tmp_path / "margin.py").write_text(code)
    done = _do(command.strip() + " --no-report", tmp_path)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "runs" / "margin" / "results.json").read_text())
    findings = {item["audit"]: item for item in stored["cells"][-1]["report"]["findings"]}
    assert 0 < findings["margin"]["value"] <= 1 and findings["margin"]["n"] > 100


@pytest.mark.slow  # tests/cli/test_worst_case.py does the same in short
def test_the_guide_to_worst_cases_runs_as_told(tmp_path):
    search, forget, judge = blocks(ROOT / "docs" / "guide" / "worst-case.md", "bash")
    done = _do(search, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "objective" in done.stdout and "lowest-loss" in done.stdout
    done = _do(forget, tmp_path)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "runs" / "worst" / "results.json").read_text())
    assert len(stored["cells"]) == 6 and all(cell["status"] == "done" for cell in stored["cells"])
    done = _do(judge, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "random-label, lr=" in done.stdout


def test_the_lines_of_the_guide_to_worst_cases_run():
    [code] = blocks(ROOT / "docs" / "guide" / "worst-case.md", "python")
    names: dict[str, object] = {}
    exec(code, names)
    assert names["errors"]["hardest"] < names["errors"]["random"]
    assert len(names["hardest"]) == 5 and len(names["request"].forget) == len(names["worst"].ids)


@pytest.mark.parametrize("page", ["language", "retain"])
def test_the_lines_of_a_guide_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(ROOT / "docs" / "guide" / f"{page}.md", "python"):
        exec(code, names)
    if page == "language":
        assert names["report"].verdict and names["unlearned"] is not None
    else:
        assert names["outcome"].matrix.scores.shape == (5, 5)


@pytest.mark.slow
def test_the_membership_page_runs_as_told(tmp_path, monkeypatch):
    page = ROOT / "docs" / "guide" / "membership.md"
    study, audit = blocks(page, "bash")
    done = _do(study.strip() + " --no-report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "most exposed (online; finetune" in done.stderr
    monkeypatch.chdir(tmp_path)
    [code] = blocks(page, "python")
    names: dict[str, object] = {}
    exec(code, names)
    made = sorted((tmp_path / "shadows").iterdir())
    assert names["report"].finding("shadow-membership.online_auc").value > 0.5
    assert len(names["report"].series["exposed"]) == 2 * 20
    for name, model in (("model", "model"), ("forgot", "unlearned"), ("retrained", "retrained")):
        palimpsest.save_model(names[model], f"{name}.safetensors")
    known = {
        word.partition("=")[0].rpartition(".")[2]
        for word in shlex.split(audit)
        if "shadow-membership." in word
    }
    again = _do(audit.strip() + " --audit-set shadow-membership.runs=6 --json", tmp_path)
    assert again.returncode == 0, again.stderr
    assert known == {"method", "folder", "workers"} and set(made) < set((tmp_path / "shadows").iterdir())
    assert len(json.loads(again.stdout)["series"]["exposed"]) == 2 * 20


def test_the_ten_lines_of_the_quickstart_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, ten, more = blocks(ROOT / "docs" / "guide" / "quickstart.md", "python")
    assert len([line for line in ten.splitlines() if line.strip()]) <= 10
    names: dict[str, object] = {}
    exec(own, names)
    exec(ten, names)
    assert Path("report.html").stat().st_size > 10_000
    assert names["report"].verdict and names["report"].facts["controls"] == 1
    exec(more.replace("task=task)", 'task=task, audits=["utility"])'), names)
    assert names["report"].facts["controls"] == 3


def test_the_readme_shows_the_same_lines_as_the_quickstart():
    [shown] = blocks(ROOT / "README.md", "python")
    ten = blocks(ROOT / "docs" / "guide" / "quickstart.md", "python")[1]
    without = [re.sub(r"\s+#.*", "", text) for text in (shown, ten)]
    assert without[0] == without[1]


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
)
def test_commands_on_the_pages_use_options_that_exist(page):
    from typer.main import get_command

    from palimpsest.cli.main import app

    verbs = get_command(app).commands
    for block in blocks(ROOT / page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["palimpsest"]:
                known = {
                    name for item in verbs[words[1]].params for name in (*item.opts, *item.secondary_opts)
                }
                assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


def test_the_demo_recipe_is_valid_and_has_six_methods_or_more_on_two_requests():
    from palimpsest.study.recipe import load_recipe

    recipe = load_recipe(ROOT / "src" / "palimpsest" / "cli" / "demo.yaml")
    assert len(recipe.methods) >= 6 and len(recipe.forget) == 2 and len(recipe.seeds) == 3
    assert recipe.data.name == "digits" and recipe.workers == 2


def test_citation_and_changelog_name_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == palimpsest.__version__
    assert {"message", "title", "authors"} <= set(citation)
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == palimpsest.__version__ and citation["license"] == project["license"]
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    plain = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    for line in wanted:
        name = re.match(r"[\w.-]+", line)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in plain, name


def test_the_makefile_and_the_ci_can_be_read():
    targets = (
        "install",
        "demo",
        "test",
        "test-slow",
        "replicate",
        "lint",
        "docs",
        "benchmarks",
        "coverage",
        "clean",
    )
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_page_on_speed_describes_the_workload_that_the_benchmark_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import importlib

    workload = importlib.import_module("methods")
    page = " ".join((ROOT / "docs" / "results" / "speed.md").read_text().split())
    shape = " x ".join(map(str, workload.SHAPE))
    assert f"channels {workload.WIDTH} and {2 * workload.WIDTH}" in page
    assert f"{workload.RECORDS} training records of {shape}" in page
    assert f"retraining for {workload.TrainingRecipe().epochs} epochs" in page
    rows = [line.split("|")[1].strip() for line in (ROOT / "docs" / "results" / "speed.md").read_text().splitlines()
            if line.startswith("| ")]  # fmt: skip
    assert set(workload.METHODS) <= set(rows)
