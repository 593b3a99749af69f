"""The recipe of a study of continual learning: methods x streams x seeds, plain and validated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecipe
from palimpsest.retain.augmentation import Augmentation
from palimpsest.retain.student import Training
from palimpsest.study.overrides import override
from palimpsest.study.recipe import DataSource, Method, Named, Network, explain, read_tree
from palimpsest.study.request import Part
from palimpsest.study.yaml_text import write_yaml


class Learning(Part):
    """How the network learns from an experience; the fields of `retain.Training`."""

    epochs: int = 1
    lr: float = 0.1
    batch_size: int = 16
    optimizer: Literal["sgd", "adam", "adadelta"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    keep_optimizer: bool = False
    head: Literal["full", "growing"] = "full"
    augmentation: Augmentation = "none"


class Pretraining(Learning):
    """Training of the network on classes that the stream then does not have; its head is new after.

    Attributes:
        classes: Which, or how many: the largest labels, or with order "seed" drawn anew for each seed.
        epochs: Passes; 0 leaves the network untrained on the same stream, for comparison.
    """

    classes: int | list[int]
    epochs: int = Field(default=10, ge=0)


class LearnerOfStudy(Method):
    """A method of the study.

    Attributes:
        training: Changes of the study's training for this method alone (its own lr, say).
    """

    training: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """The label, or name, settings and changes of the training."""
        if self.label:
            return self.label
        said = [f"{key}={value}" for key, value in sorted({**self.training, **self.settings}.items())]
        return f"{self.name} ({', '.join(said)})" if said else self.name


def _many(given: Any) -> Any:
    return list(cast(Iterable[Any], given)) if isinstance(given, list | tuple) else [given]


def _learners(given: Any) -> Any:
    return [{"name": item} if isinstance(item, str) else item for item in _many(given)]


def _one(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


def _seeds(given: Any) -> Any:
    return list(range(given)) if isinstance(given, int) else given


class RetainRecipe(Part):
    """A study of continual learning.

    Attributes:
        name: Title of tables and reports.
        data: Data set by name, with settings.
        test_data: Records to test on; None holds out a share of `data`.
        test: That share of each class.
        streams: Short forms ("class:5x2", "domain:permuted:5"); see `retain.parse_stream`.
        order: "natural" takes classes in ascending order and the same permutations for all seeds; "seed"
            draws them anew for each seed.
        model: Architecture by name; it gets one output per class of the stream.
        pretraining: Of the network, once per seed for all methods, on classes that the streams are built without;
            None starts from random weights (or published ones, if the model has them).
        training: The same for all methods.
        methods: Learners by name, with settings.
        seeds: A number of seeds, or the seeds.
        every: Steps between evaluations while learning; 0 evaluates only after experiences.
        subset: At most so many records of each test in evaluations while learning.
        gradients: Whether norms of plasticity and stability are noted at every step.
        workers: Processes; 0 works in this one.
        threads: CPU threads per cell.
        device: "auto", "cpu", "cuda", ...
        store: SQLAlchemy URL; a SQLite file in the run folder by default.
        keep_models: Whether the final networks are kept.
        imports: Python modules to import first, for what they register.
    """

    kind: Literal["retain"] = "retain"
    name: str = "retain"
    data: Annotated[DataSource, BeforeValidator(_one)] = DataSource()
    test_data: Annotated[DataSource | None, BeforeValidator(_one)] = None
    test: float = Field(default=0.2, gt=0, lt=1)
    streams: Annotated[list[str], BeforeValidator(_many)] = Field(min_length=1)
    order: Literal["natural", "seed"] = "natural"
    model: Annotated[Network, BeforeValidator(_one)] = Network(name="mlp")
    pretraining: Pretraining | None = None
    training: Learning = Learning()
    methods: Annotated[list[LearnerOfStudy], BeforeValidator(_learners)] = Field(min_length=1)
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_seeds)] = Field(
        default_factory=lambda: [0], min_length=1
    )
    every: int = Field(default=0, ge=0)
    subset: int | None = Field(default=1000, ge=1)
    gradients: bool = False
    workers: int = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)
    device: str = "auto"
    store: str | None = None
    keep_models: bool = True
    imports: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _usable(self) -> RetainRecipe:
        for kind, values in (
            ("method", [method.title for method in self.methods]),
            ("stream", self.streams),
            ("seed", [str(seed) for seed in self.seeds]),
        ):
            twice = [value for index, value in enumerate(values) if value in values[:index]]
            if twice:
                raise ValueError(f"the {kind} {twice[0]} is listed twice")
        if self.pretraining is not None:
            domain = [form for form in self.streams if re.search("domain|permuted|rotated", form)]
            if domain:
                raise ValueError(f"pretraining on other classes needs streams of classes, not {domain[0]}")
            try:
                pretraining_of(self.pretraining)
            except InvalidHyperparameter as problem:
                raise ValueError(f"the pretraining: {problem}") from problem
        for method in self.methods:
            try:
                training_of(self.training, method)
            except InvalidHyperparameter as problem:
                raise ValueError(f"the training of {method.title}: {problem}") from problem
        return self

    def plain(self) -> dict[str, Any]:
        """As plain data that `load_retain_recipe` reads back."""
        plain = self.model_dump(mode="json", by_alias=True)
        if self.pretraining is None:
            del plain["pretraining"]  # so that "pretraining.classes=5" can be set
        return plain

    def to_yaml(self) -> str:
        """As a file that `load_retain_recipe` reads back."""
        return write_yaml(self.plain())


def training_of(learning: Learning, method: LearnerOfStudy) -> Training:
    """How the network of a method learns.

    Raises:
        InvalidHyperparameter: For a key or a value that is refused.
    """
    known = set(Learning.model_fields)
    unknown = sorted(set(method.training) - known)
    if unknown:
        raise InvalidHyperparameter(f"there is no '{unknown[0]}'; known: {', '.join(sorted(known))}.")
    return Training(**{**learning.model_dump(), **method.training})


def pretraining_of(pretraining: Pretraining) -> Training:
    """How the network is pretrained.

    Raises:
        InvalidHyperparameter: For a value that is refused.
    """
    fields: dict[str, Any] = pretraining.model_dump(exclude={"classes"})
    fields["epochs"] = max(1, pretraining.epochs)
    return Training(**fields)


def load_retain_recipe(
    source: str | Path | Mapping[str, Any] | RetainRecipe, overrides: Iterable[str] = ()
) -> RetainRecipe:
    """A validated recipe from a YAML file or a mapping, with "key=value" changes.

    Raises:
        InvalidRecipe: For unreadable YAML, unknown keys (with the nearest key) and values out of range.
    """
    tree = read_tree(source.plain() if isinstance(source, RetainRecipe) else source)
    if not isinstance(tree, dict):
        raise InvalidRecipe(f"A recipe is a mapping of keys, not {type(tree).__name__}.")
    tree = cast(dict[str, Any], json.loads(json.dumps(tree)))
    try:
        for change in overrides:
            override(tree, change)
        return RetainRecipe.model_validate(tree)
    except ValidationError as problem:
        raise InvalidRecipe(explain(problem, _fields_at)) from problem


def _fields_at(place: Sequence[str]) -> set[str]:
    kinds: dict[str, type[Part]] = {
        "data": Named, "test_data": Named, "model": Named, "training": Learning, "methods": LearnerOfStudy,
        "pretraining": Pretraining,
    }  # fmt: skip
    kind = kinds.get(place[0], RetainRecipe) if place else RetainRecipe
    return {field.alias or name for name, field in kind.model_fields.items()}
