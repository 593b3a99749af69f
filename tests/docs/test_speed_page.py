"""The page on speed: every benchmark that writes there finds its marks, and writes between them alone."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "speed.md"
MARKS = re.findall(r"<!-- measured: ([\w-]+) -->", PAGE.read_text())


def _scripts(name):
    """Benchmarks that write a section: they name it in the call, or call with a name that they hold."""
    found = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text())
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        given = [node.args[0] for node in calls if getattr(node.func, "id", "") == "write_section"]
        literal = {node.value for node in given if isinstance(node, ast.Constant)}
        if name in literal or (given and not literal and name in words):
            found.append(path.name)
    return found


def test_every_section_that_a_benchmark_names_is_on_the_page():
    named = {
        node.args[0].value
        for path in (ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "write_section"
        and isinstance(node.args[0], ast.Constant)
    }  # fmt: skip
    wanted = {"gu-overhead", "guard-overhead", "uld-overhead", "tofu-suite", "unlearning-memory", "retain"}
    assert wanted <= named <= set(MARKS)


@pytest.mark.parametrize("name", MARKS)
def test_every_section_of_the_page_is_written_by_a_benchmark(name):
    assert MARKS.count(name) == 1 and len(_scripts(name)) == 1


@pytest.mark.parametrize("name", MARKS)
def test_a_section_is_written_between_its_marks_and_nowhere_else(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    writer = importlib.import_module("speed_page")
    copy = tmp_path / "speed.md"
    copy.write_text(PAGE.read_text())
    monkeypatch.setattr(writer, "PAGE", copy)
    writer.write_section(name, "| new |")
    before, after = PAGE.read_text(), copy.read_text()
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    assert "| new |" in after.partition(begin)[2].partition(end)[0]
    for part in (lambda text: text.partition(begin)[0], lambda text: text.partition(end)[2]):
        assert part(before) == part(after)
