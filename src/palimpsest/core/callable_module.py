"""Let a package be called: `palimpsest.forget(...)` beside `palimpsest.forget.classifier`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that calls the function kept under `__call_target__`."""

    __call_target__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__call_target__(*args, **kwargs)


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Make the named module call `function`, with its documentation and signature.

    Python binds a subpackage as an attribute of its parent at import, so the public verbs `forget` and
    `audit` and the packages of the same names must be one object.
    """
    package = sys.modules[module]
    package.__class__ = CallableModule
    package.__dict__["__call_target__"] = function
    package.__dict__["__wrapped__"] = function
