"""The recipe of a study: plain, validated, with overrides; the whole truth of what is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BeforeValidator, Field, JsonValue, ValidationError, model_validator

from palimpsest.core.errors import InvalidRecipe, nearest
from palimpsest.parts.training import TrainingRecipe
from palimpsest.study.overrides import override
from palimpsest.study.request import Part, Request
from palimpsest.study.yaml_text import read_yaml, write_yaml

CONTROL_SEED = 10_000
"""Seed of the first control. Seeds of cells lie below, so that a retrain cell is never its own control."""
POINTS = ("training", "unlearning", "auditing")


class Named(Part):
    """Something by its registered name, with settings."""

    name: str
    settings: dict[str, JsonValue] = Field(default_factory=dict)


class DataSource(Named):
    """The data set."""

    name: str = "digits"


class Network(Named):
    """The architecture."""

    name: str = "small_cnn"


class Domain(Named):
    """The task."""

    name: str = "classification"


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
    warmup: float = 0.0
    clip: float | None = None
    gradient_restriction: float = 0.0
    group_by_length: bool = False

    def recipe(self) -> TrainingRecipe:
        """As the training loop takes it."""
        return TrainingRecipe(**self.model_dump())


Seed = Annotated[int, Field(ge=0, lt=CONTROL_SEED)]


class Seeds(Part):
    """The three points where chance enters, seed by seed."""

    training: Seed
    unlearning: Seed
    auditing: Seed


def _seeds(given: Any) -> Any:
    """A number, a list, or lists by point, as one entry with three seeds per repetition."""
    if isinstance(given, int):
        given = list(range(given))
    if isinstance(given, Mapping):
        columns = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
        for key in columns:
            if key not in POINTS:
                close = nearest(str(key), POINTS)
                hint = f"did you mean '{close}'" if close else f"known: {', '.join(POINTS)}"
                raise ValueError(f"unknown key '{key}', {hint}")
        longest = max((len(values) for values in columns.values()), default=1)
        if any(len(values) not in (1, longest) for values in columns.values()):
            raise ValueError("lists must be of one length, or hold a single seed")
        spread = {key: values * (longest if len(values) == 1 else 1) for key, values in columns.items()}
        return [{point: spread.get(point, [0] * longest)[i] for point in POINTS} for i in range(longest)]
    items = cast(Sequence[Any], given)
    return [dict.fromkeys(POINTS, item) if isinstance(item, int) else item for item in items]


def _many(given: Any) -> Any:
    return list(given) if isinstance(given, list | tuple) else [given]


def _named(given: Any) -> Any:
    return [{"name": item} if isinstance(item, str) else item for item in _many(given)]


def _one_named(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


class Recipe(Part):
    """A study.

    Attributes:
        name: Title of tables and reports.
        data: Data set by name ("digits", "image-folder:photos") with settings.
        model: Architecture by name.
        task: What the model does: "classification", or "regression" with settings (loss, standardise, ...).
        training: Of the original model and the controls.
        split: Shares of test and holdout.
        forget: One or several requests.
        methods: To compare; "original" and "retrain" are always among the rows.
        seeds: A number of seeds, a list, or lists by point (training, unlearning, auditing).
        audits: To run; None takes all that need no shadow models.
        controls: Retrained models per request that every verdict is judged by. Their number is fixed and
            does not grow with the seeds, so that a study can be given more seeds and keep its cells.
        executor: Where cells run.
        workers: Processes of the local executor; 0 works in this process.
        threads: CPU threads per cell. Sums depend on their number in the last bit.
        device: "auto", "cpu", "cuda", ...
        store: SQLAlchemy URL; a SQLite file in the run folder by default.
        artifacts: Folder or fsspec URL of the weights; "artifacts" in the run folder by default.
        keep_models: Whether the unlearned weights are kept.
        in_turn: Whether the requests follow each other: every method meets each request with the model that
            its answer to the one before left, and without the records that are gone by then. At the end all
            earlier requests are audited once more. Otherwise every request is put to the original.
        imports: Python modules to import first, for what they register.
    """

    name: str = "study"
    data: Annotated[DataSource, BeforeValidator(_one_named)] = DataSource()
    model: Annotated[Network, BeforeValidator(_one_named)] = Network()
    task: Annotated[Domain, BeforeValidator(_one_named)] = Domain()
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
    artifacts: str | None = None
    keep_models: bool = True
    in_turn: bool = False
    imports: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _nothing_twice(self) -> Recipe:
        for kind, values in (
            ("method", [method.title for method in self.methods]),
            (
                "method",
                [json.dumps([method.name, method.settings], sort_keys=True) for method in self.methods],
            ),
            ("audit", [item.name for item in self.audits or []]),
            ("seed", [repr(seeds) for seeds in self.seeds]),
        ):
            twice = [value for index, value in enumerate(values) if value in values[:index]]
            if twice:
                raise ValueError(f"the {kind} {twice[0]} is listed twice")
        if any(method.title == "original" for method in self.methods):
            raise ValueError("'original' is always among the rows and cannot be the label of a method")
        if self.in_turn and not self.keep_models:
            raise ValueError("requests in turn need the models that are left (keep_models)")
        return self

    def plain(self) -> dict[str, Any]:
        """As plain data that `load_recipe` reads back."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """As a file that `load_recipe` reads back."""
        return write_yaml(self.plain())


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A validated recipe from a YAML file or a mapping.

    Args:
        source: File, or the same as a mapping.
        overrides: "key=value" with dotted keys ("forget.fraction=0.05", "methods.0.settings.alpha=30");
            values are read as YAML. A key into a list of one element need not name the index.

    Raises:
        InvalidRecipe: For unreadable YAML, unknown keys (with the nearest key) and values out of range.
    """
    tree = read_tree(source)
    if not isinstance(tree, dict):
        raise InvalidRecipe(f"A recipe is a mapping of keys, not {type(tree).__name__}.")
    try:
        for change in overrides:
            override(cast(dict[str, Any], tree), change)
        return Recipe.model_validate(tree)
    except ValidationError as problem:
        raise InvalidRecipe(explain(problem, _fields_at)) from problem


def read_tree(source: str | Path | Mapping[str, Any]) -> Any:
    """A recipe as plain data that were not validated yet.

    Raises:
        InvalidRecipe: If the file cannot be read, or the mapping holds more than plain data.
    """
    if isinstance(source, Mapping):
        try:
            return json.loads(json.dumps(source))
        except TypeError as problem:
            raise InvalidRecipe(f"A recipe holds plain data only: {problem}.") from problem
    try:
        return read_yaml(Path(source).read_text(encoding="utf-8"))
    except OSError as problem:
        raise InvalidRecipe(f"Cannot read the recipe {source}: {problem.strerror}.") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise InvalidRecipe(f"{source} is no valid YAML: {problem}") from problem


def content_hash(*parts: Any) -> str:
    """A short hash of plain data, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def explain(problem: ValidationError, fields_at: Callable[[Sequence[str]], set[str]]) -> str:
    """What is wrong with a recipe, in words.

    Args:
        problem: As pydantic found it.
        fields_at: Known keys at a place in the recipe.
    """
    said: list[str] = []
    for error in problem.errors():
        place = [str(step) for step in error["loc"]]
        if error["type"] == "extra_forbidden":
            known = fields_at(place[:-1])
            close = nearest(place[-1], known)
            hint = f"Did you mean '{close}'?" if close else f"Known: {', '.join(sorted(known))}."
            said.append(f"Unknown key '{'.'.join(place)}'. {hint}")
        else:
            message = error["msg"].removeprefix("Value error, ")
            said.append(f"{'.'.join(place) or 'recipe'}: {message}.")
    return "The recipe cannot be used. " + " ".join(said)


def _fields_at(place: Sequence[str]) -> set[str]:
    kinds: dict[str, type[Part]] = {
        "data": Named, "model": Named, "task": Named, "training": Training, "split": Shares, "forget": Request,
        "methods": Method, "seeds": Seeds, "audits": Named,
    }  # fmt: skip
    kind = kinds.get(place[0], Recipe) if place else Recipe
    return {field.alias or name for name, field in kind.model_fields.items()}
