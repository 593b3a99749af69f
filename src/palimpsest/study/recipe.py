"""The recipe of a study: plain, validated, with overrides; the whole truth of what is run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from palimpsest.core.errors import InvalidRecipe, InvalidSplit, PalimpsestError, UnknownName, nearest
from palimpsest.core.selection import Selection, by_column, by_fraction, by_ids
from palimpsest.parts.training import TrainingRecipe

Value = str | int | float | bool


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Named(Part):
    """Something by its registered name, with settings."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Method(Named):
    """A method of the study.

    Attributes:
        label: How it is called in tables; the name (with its settings) by default.
    """

    label: str = ""

    @property
    def title(self) -> str:
        """The label, or name and settings."""
        if self.label or not self.settings:
            return self.label or self.name
        return f"{self.name} ({', '.join(f'{key}={value}' for key, value in sorted(self.settings.items()))})"


class Shares(Part):
    """How the records are divided."""

    test: float = 0.2
    holdout: float = 0.2
    seed: int = 0


class Training(Part):
    """How the original and the retrained models are trained; the fields of `TrainingRecipe`."""

    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = None

    def recipe(self) -> TrainingRecipe:
        """As the training loop takes it."""
        return TrainingRecipe(**self.model_dump())


class Request(Part):
    """One erasure request: exactly one of label, column, fraction, ids, file, all, any, not.

    Attributes:
        label: One label or several.
        column: A column, with `values`.
        values: Values of that column.
        fraction: A random share of the training records, with `seed`.
        seed: Of the fraction.
        ids: Record ids.
        file: A JSON file with a list of ids, or with {"ids": [...]}.
        all: Requests that must all hold.
        any: Requests of which one must hold.
        negated: A request that must not hold ("not" in YAML).
    """

    label: Value | list[Value] | None = None
    column: str | None = None
    values: list[Value] | None = None
    fraction: float | None = None
    seed: int = 0
    ids: list[str] | None = None
    file: str | None = None
    all: list[Request] | None = None
    any: list[Request] | None = None
    negated: Request | None = Field(default=None, alias="not")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return request_fields(given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_kind(self) -> Request:
        kinds = [
            self.label,
            self.column,
            self.fraction,
            self.ids,
            self.file,
            self.all,
            self.any,
            self.negated,
        ]
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(
                "a request names exactly one of label, column, fraction, ids, file, all, any, not"
            )
        if (self.column is None) != (self.values is None):
            raise ValueError("column and values go together")
        return self

    def selection(self) -> Selection:
        """The rule that picks the records.

        Raises:
            InvalidSplit: If the file cannot be read, or a fraction is out of range.
        """
        if self.label is not None:
            return by_column("label", *(self.label if isinstance(self.label, list) else [self.label]))
        if self.column is not None:
            return by_column(self.column, *(self.values or []))
        if self.fraction is not None:
            return by_fraction(self.fraction, self.seed)
        if self.ids is not None:
            return by_ids(self.ids)
        if self.file is not None:
            return by_ids(_ids_of(self.file))
        if self.negated is not None:
            return ~self.negated.selection()
        parts = [request.selection() for request in (self.all or self.any or [])]
        if not parts:
            raise InvalidSplit("A request of 'all' or 'any' needs at least one part.")
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part if self.all else joined | part
        return joined


Request.model_rebuild()


class Seeds(Part):
    """The three points where chance enters, seed by seed."""

    training: int
    unlearning: int
    auditing: int


def _seeds(given: Any) -> Any:
    if isinstance(given, int):
        given = list(range(given))
    if isinstance(given, Mapping):
        columns = {key: [value] if isinstance(value, int) else list(value) for key, value in given.items()}
        unknown = set(columns) - {"training", "unlearning", "auditing"}
        if unknown:
            raise ValueError(f"seeds has no {sorted(unknown)}")
        longest = max((len(values) for values in columns.values()), default=1)
        if any(len(values) not in (1, longest) for values in columns.values()):
            raise ValueError("seed lists must be of one length, or hold a single seed")
        spread = {key: values * (longest if len(values) == 1 else 1) for key, values in columns.items()}
        points = ("training", "unlearning", "auditing")
        return [{point: spread.get(point, [0] * longest)[i] for point in points} for i in range(longest)]
    items = cast(Sequence[Any], given)
    return [
        {"training": item, "unlearning": item, "auditing": item} if isinstance(item, int) else item
        for item in items
    ]


def _many(given: Any) -> Any:
    return list(given) if isinstance(given, list | tuple) else [given]


def _named(given: Any) -> Any:
    items = given if isinstance(given, list | tuple) else [given]
    return [{"name": item} if isinstance(item, str) else item for item in items]


def _one_named(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


class Recipe(Part):
    """A study.

    Attributes:
        name: Title of tables and reports.
        data: Data set by name ("digits", "image-folder:photos") with settings.
        model: Architecture by name.
        training: Of the original model and the controls.
        split: Shares of test and holdout.
        forget: One or several requests.
        methods: To compare; "original" and "retrain" are always among the rows.
        seeds: A number of seeds, a list, or lists by point (training, unlearning, auditing).
        audits: To run; None takes all that need no shadow models.
        controls: Retrained models per request that every verdict is judged by.
        executor: Where cells run.
        workers: Processes of the local executor; 0 works in this process.
        threads: CPU threads per cell. Sums depend on their number in the last bit.
        device: "auto", "cpu", "cuda", ...
        store: SQLAlchemy URL; a SQLite file in the run folder by default.
        keep_models: Whether the unlearned weights are kept.
    """

    name: str = "study"
    data: Annotated[Named, BeforeValidator(_one_named)] = Named(name="digits")
    model: Annotated[Named, BeforeValidator(_one_named)] = Named(name="small_cnn")
    training: Training = Training()
    split: Shares = Shares()
    forget: Annotated[list[Request], BeforeValidator(_many)] = Field(min_length=1)
    methods: Annotated[list[Method], BeforeValidator(_named)] = Field(min_length=1)
    seeds: Annotated[list[Seeds], BeforeValidator(_seeds)] = Field(
        default_factory=lambda: [Seeds(training=0, unlearning=0, auditing=0)], min_length=1
    )
    audits: Annotated[list[Named], BeforeValidator(_named)] | None = None
    controls: int = Field(default=3, ge=1)
    executor: Literal["local"] = "local"
    workers: int = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)
    device: str = "auto"
    store: str | None = None
    keep_models: bool = True

    def to_yaml(self) -> str:
        """As a file that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False)


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A validated recipe from a YAML file or a mapping.

    Args:
        source: File, or the same as a mapping.
        overrides: "key=value" with dotted keys ("forget.fraction=0.05", "methods.0.settings.alpha=30");
            values are read as YAML. A key into a list of one element need not name the index.

    Raises:
        InvalidRecipe: For unreadable YAML, unknown keys (with the nearest key) and values out of range.
    """
    if isinstance(source, Mapping):
        tree: Any = json.loads(json.dumps(source))
    else:
        try:
            tree = yaml.safe_load(Path(source).read_text())
        except OSError as problem:
            raise InvalidRecipe(f"Cannot read the recipe {source}: {problem.strerror}.") from problem
        except yaml.YAMLError as problem:
            raise InvalidRecipe(f"{source} is no valid YAML: {problem}") from problem
    if not isinstance(tree, dict):
        raise InvalidRecipe("A recipe is a mapping of keys, see the guide on studies.")
    for override in overrides:
        _override(cast(dict[str, Any], tree), override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as problem:
        raise InvalidRecipe(_explain(problem)) from problem
    except PalimpsestError as problem:
        raise InvalidRecipe(str(problem)) from problem


def parse_request(text: str) -> Request:
    """A request from its short form.

    "label=3", "label=3,5", "fraction=0.1", "fraction=0.1@7" (seed 7), "subject=p17", "ids=a,b",
    "requests.json" (a file of ids); parts joined by "&" must all hold, parts joined by "|" one of them.

    Raises:
        InvalidRecipe: If it cannot be read.
    """
    try:
        return Request.model_validate(request_fields(text))
    except ValidationError as problem:
        raise InvalidRecipe(_explain(problem)) from problem


def request_fields(text: str) -> dict[str, Any]:
    """The fields of a request in short form."""
    for sign, word in (("|", "any"), ("&", "all")):
        if sign in text:
            return {word: [request_fields(part) for part in text.split(sign)]}
    text = text.strip()
    if text.startswith("not "):
        return {"not": request_fields(text[4:])}
    key, found, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not found and text.endswith(".json"):
        return {"file": text}
    if not found or not value:
        raise InvalidRecipe(
            f"Cannot read the request '{text}'. Write label=3, fraction=0.1, column=value, ids=a,b or a .json file."
        )
    if key == "fraction":
        share, _, seed = value.partition("@")
        return {"fraction": _number(share, text), "seed": int(_number(seed or "0", text))}
    items = [item.strip() for item in value.split(",")]
    if key == "ids":
        return {"ids": items}
    return {"label": items} if key == "label" else {"column": key, "values": items}


def content_hash(*parts: Any) -> str:
    """A short hash of plain data, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as problem:
        raise InvalidRecipe(f"'{text}' in the request '{whole}' is no number.") from problem


def _ids_of(file: str) -> list[str]:
    try:
        stored = json.loads(Path(file).read_text())
    except OSError as problem:
        raise InvalidSplit(f"Cannot read the ids in {file}: {problem.strerror}.") from problem
    except ValueError as problem:
        raise InvalidSplit(f"{file} is no valid JSON: {problem}") from problem
    ids = cast(Any, stored).get("ids") if isinstance(stored, dict) else stored
    if not isinstance(ids, list):
        raise InvalidSplit(f'{file} must hold a JSON list of ids, or {{"ids": [...]}}.')
    return [str(identifier) for identifier in cast(list[Any], ids)]


def _override(tree: dict[str, Any], text: str) -> None:
    path, found, value = text.partition("=")
    if not found:
        raise InvalidRecipe(f"An override is written key=value, not '{text}'.")
    *parents, last = path.strip().split(".")
    node: Any = tree
    for key in parents:
        node = _enter(node, key, path)
    node = _only(node)
    if isinstance(node, str):
        raise InvalidRecipe(f"'{path}' leads into the text '{node}', which has no keys.")
    if isinstance(node, list):
        node[_index(node, last, path)] = yaml.safe_load(value)
    else:
        node[last] = yaml.safe_load(value)


def _enter(node: Any, key: str, path: str) -> Any:
    node = _only(node)
    if isinstance(node, list):
        index = _index(node, key, path)
        node[index] = _spelled_out(node[index])
        return node[index]
    if not isinstance(node, dict):
        raise InvalidRecipe(f"'{path}' leads into {node!r}, which has no keys.")
    fields = cast(dict[str, Any], node)
    fields[key] = _spelled_out(fields.get(key, {}))
    return fields[key]


def _only(node: Any) -> Any:
    """The single element of a list of one, else the node."""
    if isinstance(node, list) and len(cast(list[Any], node)) == 1:
        node[0] = _spelled_out(node[0])
        return node[0]
    return node


def _spelled_out(node: Any) -> Any:
    """A request or name in short form as a mapping, so that keys can be set in it."""
    if not isinstance(node, str):
        return node
    return request_fields(node) if re.search(r"[=&|]|\.json$", node) else {"name": node}


def _index(node: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise InvalidRecipe(f"'{key}' in '{path}' must be an index below {len(node)}.")
    return int(key)


def _explain(problem: ValidationError) -> str:
    said: list[str] = []
    for error in problem.errors():
        place = [str(step) for step in error["loc"]]
        if error["type"] == "extra_forbidden":
            known = _fields_at(place[:-1])
            close = nearest(place[-1], known)
            hint = f"Did you mean '{close}'?" if close else f"Known: {', '.join(sorted(known))}."
            said.append(f"Unknown key '{'.'.join(place)}'. {hint}")
        else:
            said.append(f"{'.'.join(place) or 'recipe'}: {error['msg']}")
    return "The recipe cannot be used. " + " ".join(said)


def _fields_at(place: Sequence[str]) -> set[str]:
    kinds: dict[str, type[Part]] = {
        "data": Named, "model": Named, "training": Training, "split": Shares, "forget": Request,
        "methods": Method, "seeds": Seeds, "audits": Named,
    }  # fmt: skip
    kind = kinds.get(place[0], Recipe) if place else Recipe
    return {field.alias or name for name, field in kind.model_fields.items()}


__all__ = [
    "InvalidRecipe",
    "Method",
    "Named",
    "Recipe",
    "Request",
    "Seeds",
    "UnknownName",
    "content_hash",
    "load_recipe",
    "parse_request",
]
