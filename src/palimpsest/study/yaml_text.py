"""YAML as people write it: `1e-3` is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class NumberLoader(yaml.SafeLoader):
    """The safe loader, with the numbers of YAML 1.2: PyYAML takes `1e-3` for text."""


class NumberDumper(yaml.SafeDumper):
    """The safe dumper, which puts texts that look like such a number between quotes."""


for side in (NumberLoader, NumberDumper):
    side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def read_yaml(text: str) -> Any:
    """The plain data that a YAML text stands for.

    Raises:
        yaml.YAMLError: If it is no valid YAML.

    Example:
        >>> read_yaml("lr: 1e-3")
        {'lr': 0.001}
    """
    return yaml.load(text, Loader=NumberLoader)  # noqa: S506  # a safe loader


def write_yaml(data: Any) -> str:
    """A text that `read_yaml` reads back, keys in their order.

    Only ASCII is written: PyYAML does not read back some line breaks of Unicode that it writes.
    """
    return yaml.dump(data, Dumper=NumberDumper, sort_keys=False)
