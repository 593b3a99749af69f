"""Overrides: "key=value" changes of a recipe that is still a plain tree."""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

from palimpsest.core.errors import InvalidRecipe
from palimpsest.study.request import request_fields
from palimpsest.study.yaml_text import read_yaml

Tree = dict[str, Any]


def override(tree: Tree, text: str) -> None:
    """Set one value in a tree of mappings and lists, in place.

    Args:
        tree: The recipe before validation.
        text: "key=value" with a dotted key ("forget.fraction=0.05", "methods.0.settings.alpha=30"); the
            value is read as YAML. A key into a list of one element need not name its index, and short
            forms ("label=3", "ssd") are spelled out on the way.

    Raises:
        InvalidRecipe: If the key leads nowhere or the value is no YAML. A key that no recipe has is found
            when the recipe is validated.
    """
    path, found, value = text.partition("=")
    if not found or not path.strip():
        raise InvalidRecipe(f"An override is written key=value, not '{text}'.")
    *parents, last = path.strip().split(".")
    node: Any = tree
    for key in parents:
        node = _enter(node, key, path)
    node = _only(node, last)
    try:
        new = read_yaml(value)
    except yaml.YAMLError as problem:
        raise InvalidRecipe(f"The value in '{text}' is no valid YAML: {problem}") from problem
    if isinstance(node, list):
        node[_index(cast(list[Any], node), last, path)] = new
    else:
        _mapping(node, path)[last] = new


def _enter(node: Any, key: str, path: str) -> Any:
    """The child of a node, spelled out and put back in its place."""
    node = _only(node, key)
    if isinstance(node, list):
        items = cast(list[Any], node)
        index = _index(items, key, path)
        items[index] = _spelled_out(items[index])
        return items[index]
    fields = _mapping(node, path)
    if key == "0" and "0" not in fields:
        return fields  # a single element that was not written as a list
    fields[key] = _spelled_out(fields.get(key, {}))
    return fields[key]


def _only(node: Any, key: str) -> Any:
    """The single element of a list of one if the key does not name it, else the node."""
    if not isinstance(node, list) or key.isdigit():
        return node
    items = cast(list[Any], node)
    if len(items) != 1:
        return items
    items[0] = _spelled_out(items[0])
    return items[0]


def _mapping(node: Any, path: str) -> Tree:
    if not isinstance(node, dict):
        raise InvalidRecipe(f"'{path}' leads into {node!r}, which has no keys.")
    return cast(Tree, node)


def _spelled_out(node: Any) -> Any:
    """A request or name in short form as a mapping, so that keys can be set in it."""
    if not isinstance(node, str):
        return node
    return request_fields(node) if re.search(r"[=&|]|\.json$", node) else {"name": node}


def _index(node: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise InvalidRecipe(f"'{key}' in '{path}' must be an index below {len(node)}.")
    return int(key)
