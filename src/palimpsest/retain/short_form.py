"""Streams by their short form, for recipes and the command line."""

from __future__ import annotations

import re
from typing import Literal, cast

from palimpsest.core.errors import InvalidStream, nearest
from palimpsest.core.records import Records
from palimpsest.retain.recurrence import Law, Recurrence, recurring
from palimpsest.retain.streams import Stream, class_incremental, domain_incremental

RECURRENCE: dict[str, Law] = {
    "power-law": "power",
    "lag-power-law": "lag-power",
    "free-power-law": "free-power",
    "exponential": "exponential",
    "uniform": "uniform",
    "full": "full",
}
KINDS = ("class", "task", "domain", "blurry", *RECURRENCE)
FORM = "class:5x2, task:5x2, domain:permuted:5, domain:rotated:0,30,60, blurry:5x2@0.1, power-law:permuted:6@0.25"


def parse_stream(
    text: str, records: Records, *, seed: int | None = None, test: float | Records = 0.2, test_seed: int = 0
) -> Stream:
    """The stream that a short form names.

    - "class:5x2", "task:5x2": 5 experiences of 2 classes; "class:4,2,2": of 4, 2 and 2 classes.
    - "domain:permuted:5", "domain:rotated:5", "domain:rotated:0,30,60" (degrees).
    - "blurry:5x2@0.1": a tenth of each class's records is met in other experiences.
    - "power-law:permuted:6@0.25", "power-law:5x2@0.25": earlier tasks return, at most a quarter of the new
      records; likewise "uniform", "exponential", "lag-power-law", and without a budget "free-power-law", "full".
    - Any of them with ":online" at the end: every record is seen once.

    Args:
        text: The short form.
        records: To divide.
        seed: Of the order of classes (None takes ascending order), of permutations, angles and draws (None
            is 0 there).
        test: Share of each class, or records, to test on.
        test_seed: Of the draw of the share, so that the split stays while the order varies.

    Raises:
        InvalidStream: If it cannot be read, or the records do not allow it.
    """
    body, online = text.strip(), False
    if body.endswith(":online"):
        body, online = body.removesuffix(":online"), True
    kind, _, rest = body.partition(":")
    what, at, share = rest.partition("@")
    if kind not in KINDS:
        close = nearest(kind, KINDS)
        hint = f"Did you mean '{close}'?" if close else f"Write {FORM}."
        raise InvalidStream(f"Unknown kind of stream '{kind}' in '{text}'. {hint}")
    if kind in RECURRENCE:
        law = RECURRENCE[kind]
        recurrence = Recurrence(law, _number(share, text)) if at else Recurrence(law)
        base = f"class:{what}" if re.fullmatch(r"[\dx,]+", what) else f"domain:{what}"
        stream = parse_stream(
            base + (":online" if online else ""), records, seed=seed, test=test, test_seed=test_seed
        )
        return recurring(stream, recurrence, seed or 0)
    if at and kind != "blurry":
        raise InvalidStream(f"A '{kind}' stream takes no share after '@': '{text}'. Write {FORM}.")
    if kind == "domain":
        change, _, tasks = what.partition(":")
        numbers: int | list[float] = [_number(item, text) for item in tasks.split(",")]
        if len(numbers) == 1:
            numbers = int(numbers[0])
        return domain_incremental(
            records, cast(Literal["permuted", "rotated"], change), numbers,
            seed=seed or 0, test=test, test_seed=test_seed, online=online, name=text,
        )  # fmt: skip
    blurry = _number(share or "0.1", text) if kind == "blurry" else 0.0
    return class_incremental(
        records, _sizes(what, text), seed=seed, test=test, test_seed=test_seed,
        scenario="task" if kind == "task" else "class", blurry=blurry, online=online, name=text,
    )  # fmt: skip


def _sizes(what: str, text: str) -> list[int]:
    repeated = re.fullmatch(r"(\d+)x(\d+)", what)
    if repeated:
        return [int(repeated[2])] * int(repeated[1])
    if re.fullmatch(r"\d+(,\d+)*", what):
        return [int(size) for size in what.split(",")]
    raise InvalidStream(
        f"Cannot read '{what}' in '{text}': 5x2 is 5 experiences of 2 classes, 4,2,2 three of them."
    )


def _number(item: str, text: str) -> float:
    try:
        return float(item)
    except ValueError as problem:
        raise InvalidStream(f"Cannot read the number '{item}' in '{text}'. Write {FORM}.") from problem
