"""Erasure requests as plain data: what a recipe or a command line says is to be forgotten."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from palimpsest.core.errors import InvalidRecipe, InvalidSplit
from palimpsest.core.selection import Selection, by_column, by_fraction, by_ids

Value = str | int | float | bool


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Request(Part):
    """One erasure request: exactly one of label, column, fraction, ids, file, all, any, not.

    Attributes:
        name: How it is called in tables; its rule in words by default.
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

    name: str = ""
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
        kinds = (
            self.label,
            self.column,
            self.fraction,
            self.ids,
            self.file,
            self.all,
            self.any,
            self.negated,
        )
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(
                "a request names exactly one of label, column, fraction, ids, file, all, any, not"
            )
        if (self.column is None) != (self.values is None):
            raise ValueError("column and values go together")
        return self

    @model_serializer(mode="wrap")
    def _what_is_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said = {key: value for key, value in handler(self).items() if value is not None and value != ""}
        if self.fraction is None:
            said.pop("seed", None)
        return said

    def selection(self) -> Selection:
        """The rule that picks the records, described as tables show it.

        Raises:
            InvalidSplit: If the file cannot be read, or a fraction is out of range.
        """
        rule = self._rule()
        shown = self.name or (Path(self.file).name if self.file else rule.description)
        return replace(rule, description=shown)

    def _rule(self) -> Selection:
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
        return reduce(lambda a, b: a & b if self.all else a | b, parts)


Request.model_rebuild()


def parse_request(text: str) -> Request:
    """A request from its short form.

    "label=3", "label=3,5", "fraction=0.1", "fraction=0.1@7" (seed 7), "subject=p17", "ids=a,b",
    "requests.json" (a file of ids), "not label=3"; parts joined by "&" must all hold, parts joined by "|"
    one of them ("&" binds closer).

    Raises:
        InvalidRecipe: If it cannot be read.

    Example:
        >>> parse_request("label=3 & fraction=0.5").selection().description
        '(label = 3) and (a random 0.5 of the records (seed 0))'
    """
    try:
        return Request.model_validate(request_fields(text))
    except ValidationError as problem:
        said = "; ".join(error["msg"].removeprefix("Value error, ") for error in problem.errors())
        raise InvalidRecipe(f"Cannot read the request '{text}': {said}.") from problem


def request_fields(text: str) -> dict[str, Any]:
    """The fields of a request in short form."""
    for sign, word in (("|", "any"), ("&", "all")):
        if sign in text:
            return {word: [request_fields(part) for part in text.split(sign)]}
    text = text.strip()
    if text.startswith("not "):
        return {"not": request_fields(text[4:])}
    key, found, value = (part.strip() for part in text.partition("="))
    if not found and text.endswith(".json"):
        return {"file": text}
    if not key or not found or not value:
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


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as problem:
        raise InvalidRecipe(f"'{text}' in the request '{whole}' is no number.") from problem


def _ids_of(file: str) -> list[str]:
    try:
        stored = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as problem:
        raise InvalidSplit(f"Cannot read the ids in {file}: {problem.strerror}.") from problem
    except ValueError as problem:
        raise InvalidSplit(f"{file} is no valid JSON: {problem}") from problem
    ids = cast(Any, stored).get("ids") if isinstance(stored, dict) else stored
    if not isinstance(ids, list):
        raise InvalidSplit(f'{file} must hold a JSON list of ids, or {{"ids": [...]}}.')
    return [str(identifier) for identifier in cast(list[Any], ids)]
