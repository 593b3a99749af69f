"""Registries fill themselves from one package or several."""

from __future__ import annotations

import sys

import pytest

from palimpsest.core.auditing import AUDITS
from palimpsest.core.errors import UnknownName
from palimpsest.core.registry import Registry


def test_audits_are_found_in_the_audits_and_in_the_suites():
    assert {"recall", "tofu", "restor", "wmdp"} <= set(AUDITS.names())


def test_every_package_of_several_is_imported_at_the_first_look_up(tmp_path, monkeypatch):
    things: Registry[str] = Registry("thing", ("first_of_two", "second_of_two"))
    for package in things.packages:
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "entry.py").write_text(f"import sys\nsys.things.register('{package}')('{package}')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "things", things, raising=False)
    assert things.names() == ["first_of_two", "second_of_two"]
    with pytest.raises(UnknownName, match="first_of_two"):
        things.get("first_of_tow")
