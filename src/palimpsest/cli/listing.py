"""Lists of what is registered, as a table, Markdown or JSON."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.cli.output import emit, show
from palimpsest.core.errors import InvalidRecords
from palimpsest.core.writing import write_text


@dataclass(frozen=True)
class Listing:
    """Rows of plain data.

    Attributes:
        columns: Keys that tables show, in order; JSON holds all keys.
        rows: One per entry. A "link" is put on the cell "paper".
    """

    columns: tuple[str, ...]
    rows: Sequence[dict[str, Any]]

    def print(self, markdown: bool, as_json: bool) -> None:
        """On standard output."""
        if as_json:
            emit(list(self.rows))
        elif markdown:
            print(self.markdown())
        else:
            self._table()

    def markdown(self) -> str:
        """As a Markdown table, without a line end."""
        lines = [" | ".join(self.columns), " | ".join("---" for _ in self.columns)]
        for row in self.rows:
            cells = {key: _text(value).replace("|", "\\|") for key, value in row.items()}
            if row.get("link"):
                cells["paper"] = f"[{cells['paper']}]({row['link']})"
            cells["name"] = f"`{row['name']}`"
            lines.append(" | ".join(cells[column] for column in self.columns))
        return "\n".join(f"| {line} |" for line in lines)

    def _table(self) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in self.columns:
            table.add_column(column, no_wrap=column == "name", style="bold" if column == "name" else None)
        for row in self.rows:
            table.add_row(*(Text(_text(row[column])) for column in self.columns))
        show(table)


def described(
    entries: Iterable[tuple[str, Callable[..., Any]]], heading: str, hidden: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Rows of registered callables: name, first line of the docstring, settings with their defaults."""
    rows: list[dict[str, Any]] = []
    for name, entry in entries:
        parameters = inspect.signature(entry).parameters.values()
        settings = [_setting(item) for item in parameters if item.name not in hidden]
        summary = (inspect.getdoc(entry) or "").partition("\n")[0]
        rows.append({"name": name, heading: summary, "settings": settings})
    return rows


def _setting(parameter: inspect.Parameter) -> str:
    required = parameter.default is inspect.Parameter.empty
    return parameter.name if required else f"{parameter.name}={parameter.default}"


def replace_between(path: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark:begin ... -->` and `<!-- mark:end -->` in a file.

    Raises:
        InvalidRecords: If the file or the marks are not there.
        CannotWrite: If it cannot be written.
    """
    try:
        before = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise InvalidRecords(f"Cannot read {path}: {problem.strerror}.") from problem
    pattern = re.compile(rf"(<!-- {mark}:begin\b[^>]*-->\n).*?(<!-- {mark}:end -->)", re.DOTALL)
    if not pattern.search(before):
        raise InvalidRecords(f"{path} has no marks <!-- {mark}:begin --> and <!-- {mark}:end -->.")
    write_text(path, pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
