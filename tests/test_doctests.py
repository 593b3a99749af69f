"""Examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import palimpsest

MODULES = [
    module.name
    for module in pkgutil.walk_packages(palimpsest.__path__, "palimpsest.")
    if ".migrations" not in module.name
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
