"""MUSE in its published format: texts to forget and to retain, and what is asked about them.

Shi et al. 2025, arXiv 2407.06460. A folder with the sub-folders raw, verbmem, knowmem, privleak and, for News,
scal and sust is read, or the data set of the Hub ("muse-bench/MUSE-News", "muse-bench/MUSE-Books").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.core.errors import InvalidRecords, shorten
from palimpsest.core.records import Records
from palimpsest.core.split import RESERVED
from palimpsest.data.json_rows import (
    ENDS,
    Located,
    field_text,
    hub_configurations,
    hub_rows,
    local_rows,
    read_text,
)
from palimpsest.data.registry import dataset

WORDS = 1000
"""Of a piece of running text: about 1400 tokens of Llama, where the published blocks have 2047."""
FILES = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "verbmem": ("forget",),
    "knowmem": ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"),
    "privleak": ("forget", "holdout"),
    "scal": ("forget_1", "forget_2", "forget_3", "forget_4"),
    "sust": ("forget_1", "forget_2", "forget_3", "forget_4"),
}
"""Splits by configuration."""
NEEDED = (
    ("raw", "forget"), ("raw", "retain2"), ("verbmem", "forget"), ("knowmem", "forget_qa"),
    ("knowmem", "retain_qa"), ("privleak", "forget"), ("privleak", "holdout"),
)  # fmt: skip
"""Without these there are no six ways."""
OTHER_NAMES = {"retain_qa": "retain2_qa", "retain_qa_icl": "retain2_qa_icl"}
"""How some copies call a split."""

Files = dict[tuple[str, str], list[Located]]


@dataset("muse")
def muse(source: str | Path, words: int = WORDS) -> Records:
    """MUSE (ICLR 2025) from a folder with its published files, or from the Hub.

    Running text is cut into pieces of `words` words, which fit the context of a model as the published blocks
    of 2047 tokens do; documents of privleak are cut to their first piece. Columns: part; form ("text",
    "verbmem", "knowmem", "examples", "privleak"); role ("forget", "retain1", "retain2", "holdout"; of
    questions "forget" or "retain2"); scal_1 to scal_4 (nested) and sust_1 to sust_4 (disjoint), 1 for the
    texts of such a forget set; "reserved", 1 for retain2: models are trained on it, and methods may not use it.
    Forget `role=forget`.

    Args:
        source: Folder, or name on the Hub.
        words: Of a piece.

    Raises:
        InvalidRecords: If a file is missing, a row cannot be used (row and column are named), or the sets of
            scal are not nested or those of sust not disjoint.
        MissingDependency: If a data set of the Hub is named and `datasets` is not installed.
    """
    if words < 2:
        raise InvalidRecords(f"A piece of text has at least 2 words, not {words}.")
    files = _read(source)
    absent = ["/".join(name) for name in NEEDED if name not in files]
    if absent:
        raise InvalidRecords(f"'{source}' lacks {shorten(absent)}: MUSE cannot be measured without.")
    empty = ["/".join(name) for name, rows in files.items() if not rows]
    if empty:
        raise InvalidRecords(f"'{source}': {shorten(empty)} hold no rows.")
    texts = {
        name: [_text(*row) for row in rows]
        for name, rows in files.items()
        if name[0] in ("raw", "scal", "sust")
    }
    _check_sets(texts)
    table = _Table(_members(texts))
    for role in FILES["raw"]:
        for number, text in enumerate(texts.get(("raw", role), ())):
            table.add_text(f"{role}/{number:04d}", text, role, words)
    table.add_missing(words)
    for number, (where, row) in enumerate(files["verbmem", "forget"]):
        prompt, rest = field_text(where, row, "prompt"), field_text(where, row, "gt")
        item = {"text": pieces(rest, words)[0], "prompt": prompt, "continuation": rest}
        table.add(f"verbmem/{number:03d}", item, "test", "verbmem", "forget")
    for name, form, role in (
        ("forget_qa", "knowmem", "forget"), ("retain_qa", "knowmem", "retain2"),
        ("forget_qa_icl", "examples", "forget"), ("retain_qa_icl", "examples", "retain2"),
    ):  # fmt: skip
        for number, (where, row) in enumerate(files.get(("knowmem", name), ())):
            item = {key: field_text(where, row, key) for key in ("question", "answer")}
            table.add(f"{name}/{number:03d}", item, "test", form, role)
    for role, part in (("forget", "test"), ("holdout", "holdout")):
        for number, row in enumerate(files["privleak", role]):
            document = {"text": pieces(_text(*row), words)[0]}
            table.add(f"privleak-{role}/{number:03d}", document, part, "privleak", role)
    return table.records()


def pieces(text: str, words: int) -> list[str]:
    """A text in consecutive pieces of at most so many words; white space between them is made one blank.

    Example:
        >>> pieces("a b c d e", 2)
        ['a b', 'c d', 'e']
    """
    whole = text.split()
    if len(whole) <= words:
        return [text]
    return [" ".join(whole[start : start + words]) for start in range(0, len(whole), words)]


class _Table:
    """Records as they are put together."""

    def __init__(self, members: Mapping[str, set[str]]):
        self.members = members
        self.ids: list[str] = []
        self.items: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.seen: set[str] = set()

    def add(self, name: str, item: dict[str, Any], part: str, form: str, role: str, text: str = "") -> None:
        """One record; `text` is the whole published text that it is a piece of."""
        self.ids.append(name)
        self.items.append(item)
        sets = {column: int(text in inside) for column, inside in self.members.items()}
        values = {"part": part, "form": form, "role": role, "fact": name}
        self.rows.append({**values, RESERVED: int(part == "train" and role == "retain2"), **sets})

    def add_text(self, name: str, text: str, role: str, words: int) -> None:
        """The pieces of a text; a text that is there already is not added again."""
        if text in self.seen and role != "holdout":
            return
        self.seen.add(text)
        part = "holdout" if role == "holdout" else "train"
        for number, piece in enumerate(pieces(text, words)):
            self.add(f"{name}/{number:03d}", {"text": piece}, part, "text", role, text)

    def add_missing(self, words: int) -> None:
        """Texts of scal and sust that are in no file of raw: models are trained on them too."""
        wanted = dict.fromkeys(text for inside in self.members.values() for text in sorted(inside))
        for number, text in enumerate(text for text in wanted if text not in self.seen):
            self.add_text(f"sets/{number:04d}", text, "sets", words)

    def records(self) -> Records:
        """All of them."""
        names = list(self.rows[0])
        columns = {
            name: np.array(
                [row[name] for row in self.rows], object if isinstance(self.rows[0][name], str) else None
            )
            for name in names
        }
        return Records(self.items, ids=self.ids, columns=columns)


def _read(source: str | Path) -> Files:
    """Rows by configuration and split."""
    place = Path(source)
    if place.is_dir():
        return dict(_local(place))
    if place.exists() or place.is_absolute():
        raise InvalidRecords(
            f"'{place}' is no folder: MUSE is a folder with raw, verbmem, knowmem and privleak."
        )
    there = hub_configurations(str(source))
    return {
        (group, name): list(hub_rows(str(source), name, group))
        for group, names in FILES.items()
        if group in there
        for name in names
    }


def _local(place: Path) -> Iterator[tuple[tuple[str, str], list[Located]]]:
    for group, names in FILES.items():
        for name in names:
            for file in _files(place / group, name):
                yield (group, name), _rows(file)
                break


def _files(folder: Path, name: str) -> Iterator[Path]:
    for called in (name, OTHER_NAMES.get(name, name)):
        for end in (*ENDS, ".txt"):
            if (folder / f"{called}{end}").exists():
                yield folder / f"{called}{end}"


def _rows(file: Path) -> list[Located]:
    if file.suffix == ".txt":
        text = read_text(file)
        return [(str(file), text)] if text.strip() else []
    return list(local_rows(file))


def _text(where: str, row: Any) -> str:
    """A row of running text: the text itself, or an object with it."""
    if isinstance(row, str):
        if not row.strip():
            raise InvalidRecords(f"{where}: a text that is not empty is needed.")
        return row
    return field_text(where, row, "text")


def _members(texts: Mapping[tuple[str, str], Sequence[str]]) -> dict[str, set[str]]:
    """Texts of each set of scal and sust, by the name of the column."""
    return {
        f"{group}_{name.removeprefix('forget_')}": set(inside)
        for (group, name), inside in texts.items()
        if group != "raw"
    }


def _check_sets(texts: Mapping[tuple[str, str], Sequence[str]]) -> None:
    """Refuse sets of scal that do not hold one another, and sets of sust that share a text."""
    nested = [(name, texts[group, name]) for group, name in texts if group == "scal"]
    for (smaller, inner), (larger, outer) in pairwise(nested):
        lost = [number for number, text in enumerate(inner, 1) if text not in set(outer)]
        if lost:
            raise InvalidRecords(
                f"scal/{smaller}, row {lost[0]}: the text is not in scal/{larger}, which must hold it."
            )
    owner: dict[str, str] = {}
    for group, name in texts:
        for number, text in enumerate(texts[group, name] if group == "sust" else (), 1):
            if owner.setdefault(text, name) != name:
                raise InvalidRecords(f"sust/{name}, row {number}: the text is in sust/{owner[text]} too.")
