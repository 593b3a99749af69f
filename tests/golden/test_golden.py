"""Reference values: every case of every file in the folder is run through the library.

The folder is `tests/golden/values`, or the one that PALIMPSEST_GOLDEN_DIR names. A file is called after
the slug of its system; `tests/golden/mapping/<slug>.py` says which function of the library computes which
function of the file.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("PALIMPSEST_GOLDEN_DIR") or Path(__file__).parent / "values")
ABSOLUTE = 1e-9


def _cases() -> list[Any]:
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        for case in json.loads(path.read_text())["cases"]:
            found.append(pytest.param(path.stem, case, id=f"{path.stem}:{case['name']}"))
    return found


def _mapping(slug: str) -> dict[str, Any] | None:
    name = f"tests.golden.mapping.{slug.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name).FUNCTIONS


def differences(found: Any, expected: Any, rtol: float, atol: float, where: str = "") -> list[str]:
    """Places where two nested values differ by more than atol + rtol * |expected|."""
    if isinstance(expected, dict):
        gaps = [f"{where}.{key}: missing" for key in expected if key not in found]
        shared = (key for key in expected if key in found)
        return gaps + [
            d for key in shared for d in differences(found[key], expected[key], rtol, atol, f"{where}.{key}")
        ]
    if isinstance(expected, list):
        if len(found) != len(expected):
            return [f"{where}: {len(found)} items instead of {len(expected)}"]
        return [
            d
            for index, (a, b) in enumerate(zip(found, expected, strict=True))
            for d in differences(a, b, rtol, atol, f"{where}[{index}]")
        ]
    if isinstance(expected, str | bool) or expected is None:
        return [] if found == expected else [f"{where}: {found!r} instead of {expected!r}"]
    close = math.isclose(found, expected, rel_tol=0, abs_tol=atol + rtol * abs(expected))
    same_nan = math.isnan(expected) and math.isnan(found)
    return [] if close or same_nan else [f"{where}: {found!r} instead of {expected!r}"]


@pytest.mark.parametrize(("slug", "case"), _cases())
def test_the_library_agrees_with_the_reference(slug: str, case: dict[str, Any]):
    functions = _mapping(slug)
    if functions is None:
        pytest.fail(f"no mapping of '{slug}': its reference values would go unchecked")
    assert case["function"] in functions, f"'{slug}' has no mapping for function '{case['function']}'"
    found = functions[case["function"]](case["inputs"], case.get("params") or {})
    optional = set(case.get("compatibility") or ())
    expected = case["expected"]
    if isinstance(expected, dict):
        expected = {key: value for key, value in expected.items() if key not in optional or key in found}
    atol = case.get("atol", ABSOLUTE)
    assert not differences(found, expected, case["rtol"], atol)


def test_the_folder_holds_cases():
    assert _cases(), f"no golden case in {FOLDER}"


def test_a_wrong_value_is_noticed():
    expected = {"a": [1.0, {"b": 2.0}]}
    assert differences({"a": [1.0, {"b": 2.0}]}, expected, 1e-6, 0) == []
    assert differences({"a": [1.0, {"b": 2.1}]}, expected, 1e-6, 0) == [".a[1].b: 2.1 instead of 2.0"]
    assert differences({"a": [1.0]}, expected, 1e-6, 0) == [".a: 1 items instead of 2"]
    assert differences({}, expected, 1e-6, 0) == [".a: missing"]
