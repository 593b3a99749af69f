"""The run folder: locked while a study works in it, and kept to one study."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from palimpsest.core.errors import CannotWrite, InvalidRecipe, RunLocked
from palimpsest.core.writing import write_text
from palimpsest.study.recipe import Method, Recipe, load_recipe
from palimpsest.study.request import Request

RECIPE, DATABASE, ARTIFACTS, LOCK = "recipe.yaml", "study.sqlite", "artifacts", ".lock"
FIXED = (
    "data",
    "model",
    "task",
    "training",
    "split",
    "audits",
    "controls",
    "threads",
    "device",
    "artifacts",
    "in_turn",
)
"""Keys on which every cell of a folder agrees; requests, methods and seeds may be added."""


@contextmanager
def locked(folder: Path, wait: bool, console: Console) -> Generator[None]:
    """The folder for this process alone; the system frees the lock of a process that dies.

    Args:
        folder: Of the run.
        wait: Whether to wait for another process.
        console: To say so on.

    Raises:
        RunLocked: If another process has it and `wait` is false.
        CannotWrite: If the lock file cannot be made.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as problem:
        if not wait:
            raise RunLocked(
                f"Another process is working on {folder}; wait for it, or choose another folder."
            ) from problem
        console.print(f"Another process is working on {folder}; waiting for it.")
        lock.acquire()
    except OSError as problem:
        raise CannotWrite(f"Cannot lock {folder}: {problem.strerror or problem}.") from problem
    try:
        yield
    finally:
        lock.release()


def keep_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into its folder.

    Raises:
        InvalidRecipe: If the folder holds another study that this one does not extend.
        CannotWrite: If it cannot be written.
    """
    path = folder / RECIPE
    if path.is_file():
        check_extends(load_recipe(path), recipe, folder)
    text = recipe.to_yaml()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def check_extends(old: Recipe, new: Recipe, folder: Path) -> None:
    """Check that of two recipes one only adds requests, methods and seeds to the other.

    How a study is run (workers, store, name, labels) may change.

    Raises:
        InvalidRecipe: Naming what differs.
    """
    changed = [key for key in FIXED if getattr(old, key) != getattr(new, key)]
    before, after = _contents(old), _contents(new)
    lost, added = (
        [item for item in before if item not in after],
        [item for item in after if item not in before],
    )
    if changed or (lost and added):
        said = [f"{key} differs" for key in changed]
        said += [f"there: {', '.join(lost)}; here instead: {', '.join(added)}"] if lost and added else []
        raise InvalidRecipe(
            f"{folder} holds another study, which this recipe does not extend ({'; '.join(said)}). Add to what is "
            "there, or choose another folder."
        )


def _contents(recipe: Recipe) -> list[str]:
    seeds = [
        ", ".join(f"{point} {seed}" for point, seed in item.model_dump().items()) for item in recipe.seeds
    ]
    return [
        *(f"request {_rule(item)}" for item in recipe.forget),
        *(f"method {_method(item)}" for item in recipe.methods),
        *(f"seeds ({item})" for item in seeds),
    ]


def _rule(request: Request) -> str:
    """A request without its name; values as text, as command lines and files write them differently."""
    said = request.model_dump(mode="json", by_alias=True)
    said.pop("name", None)
    return str(_texts(said))


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in value.items()}
    return [_texts(item) for item in value] if isinstance(value, list) else str(value)


def _method(method: Method) -> str:
    return f"{method.name} {dict(sorted(method.settings.items()))}" if method.settings else method.name
