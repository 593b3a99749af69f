"""Readers of TOFU's published evaluation logs, from which its printed figures can be recomputed.

`eval_log_aggregated.json` holds {file: {metric: {item: value}}} with the four files of `FILES`; the
released logs hold the first 300 items of each set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.audit.truth_ratio import (
    ForgetQuality,
    Mean,
    check_same_items,
    forget_quality,
    truth_ratios,
)
from palimpsest.core.errors import InvalidRecords, shorten
from palimpsest.suites.tofu_scores import SetLosses, SetScores, model_utility, set_scores

FILES = {
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
    "eval_log_forget.json": "forget",
}
"""Files of a log, and the sets that they are about."""
ANSWER, PARAPHRASE, WRONG, ROUGE = (
    "avg_gt_loss",
    "avg_paraphrased_loss",
    "average_perturb_loss",
    "rougeL_recall",
)
FORGET_FILE = "eval_log_forget.json"


@dataclass(frozen=True)
class LogScores:
    """What a log says.

    Attributes:
        sets: Numbers by set.
        utility: Model utility.
        mean: How wrong answers were averaged.
    """

    sets: dict[str, SetScores]
    utility: float
    mean: Mean


def read_log(path: str | Path) -> dict[str, Any]:
    """A published log.

    Raises:
        InvalidRecords: If the file cannot be read or is no such log.
    """
    try:
        log = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRecords(f"The evaluation log {path} cannot be read: {error}.") from error
    if not isinstance(log, dict) or not set(FILES) & set(log):
        raise InvalidRecords(f"{path} is no evaluation log: none of {shorten(list(FILES))} is in it.")
    return log


def set_losses(log: Mapping[str, Any], file: str) -> SetLosses:
    """Losses of one file of a log, matched by item.

    Raises:
        InvalidRecords: If the file or one of its metrics is missing, or their items differ.
        InvalidAudit: If a value cannot be a loss.
    """
    columns = _columns(log, file, (ANSWER, PARAPHRASE, WRONG, ROUGE))
    items = tuple(columns[ANSWER])
    for name, column in columns.items():
        if column.keys() != columns[ANSWER].keys():
            only = sorted(column.keys() ^ columns[ANSWER].keys())
            raise InvalidRecords(f"'{file}': {name} and {ANSWER} are about other items: {shorten(only)}.")
    wrong = [columns[WRONG][item] for item in items]
    answer, paraphrase, rouge = (
        np.array([columns[name][item] for item in items], float) for name in (ANSWER, PARAPHRASE, ROUGE)
    )
    return SetLosses(items, answer, paraphrase, _table(wrong, file), rouge)


def log_scores(log: Mapping[str, Any], mean: Mean = "geometric") -> LogScores:
    """All numbers of a log; "geometric" are the leaderboard's, "arithmetic" the paper's.

    Raises:
        InvalidRecords: If one of the sets of model utility is missing.
    """
    files = [file for file in FILES if file in log or file != FORGET_FILE]
    sets = {FILES[file]: set_scores(FILES[file], set_losses(log, file), mean) for file in files}
    return LogScores(sets, model_utility(sets), mean)


def log_forget_quality(
    unlearned: Mapping[str, Any], reference: Mapping[str, Any], mean: Mean = "geometric"
) -> ForgetQuality:
    """Forget quality between two logs; only losses of paraphrased and wrong answers are needed.

    Raises:
        InvalidRecords: If a log lacks them.
        InvalidAudit: If the logs are about other items.
    """
    return forget_quality(forget_ratios(unlearned, mean), forget_ratios(reference, mean))


def forget_ratios(log: Mapping[str, Any], mean: Mean = "geometric") -> dict[str, float]:
    """Truth ratio of every forget item of a log."""
    columns = _columns(log, FORGET_FILE, (PARAPHRASE, WRONG))
    check_same_items(columns[PARAPHRASE], columns[WRONG])
    items = list(columns[PARAPHRASE])
    paraphrase = np.array([columns[PARAPHRASE][item] for item in items], float)
    wrong = _table([columns[WRONG][item] for item in items], FORGET_FILE)
    return dict(zip(items, truth_ratios(paraphrase, wrong, mean).tolist(), strict=True))


def _columns(log: Mapping[str, Any], file: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    if file not in log:
        raise InvalidRecords(
            f"The log has no '{file}' ({FILES.get(file, 'unknown')}); it has {shorten(list(log))}."
        )
    missing = [name for name in names if not log[file].get(name)]
    if missing:
        raise InvalidRecords(f"'{file}' lacks {', '.join(missing)}: its scores cannot be computed.")
    return {name: log[file][name] for name in names}


def _table(wrong: list[Any], file: str) -> np.ndarray:
    lengths = {len(row) for row in wrong}
    if len(lengths) != 1:
        raise InvalidRecords(
            f"'{file}': every question needs as many wrong answers; lists of {sorted(lengths)} were found."
        )
    return np.array(wrong, float)
