"""A study's result as a Markdown page, for documentation that is never typed by hand."""

from __future__ import annotations

from palimpsest.study.result import COLUMNS, SHARE, StudyResult, shown, verdicts_of
from palimpsest.study.turns import HEADINGS, in_turn, turns_of


def to_markdown(result: StudyResult) -> str:
    """One table per request with means over seeds and verdicts; for requests in turn, first one over all."""
    lines = [
        f"# {result.name}", "",
        "Means over seeds with half of the 95 % interval; accuracies and cost in percent. Written by "
        "`palimpsest compare --markdown`.", "",
    ]  # fmt: skip
    if in_turn(result):
        lines += ["## From the first request to the last", "", *_turns(result), ""]
    request = ""
    summaries = result.summary()
    columns = [*(name for name in COLUMNS if any(name in item.means for item in summaries)), SHARE]
    for item in summaries:
        if item.request != request:
            request = item.request
            lines += [f"## {request}", "", _row("method", "verdicts", *columns)]
            lines += ["|---|---|" + "---:|" * len(columns)]
        figures = [shown(heading, item.means) for heading in columns]
        lines.append(_row(item.label, verdicts_of(item), *figures))
    return "\n".join(lines) + "\n"


def _turns(result: StudyResult) -> list[str]:
    lines = [_row("method", "first request", "at the end", "last request", *HEADINGS)]
    lines.append("|---|---|---|---|" + "---:|" * len(HEADINGS))
    for item in turns_of(result):
        lines.append(_row(item.label, *item.words(), *item.shown()))
    return [*lines, "", *(f"- {heading}: {meaning}" for heading, meaning in HEADINGS.items())]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
