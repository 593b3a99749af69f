"""A finished study with every series that is drawn, and its page."""

from __future__ import annotations

import pytest

from palimpsest.report import write_report
from palimpsest.study.compare import compare

AUDITS = [
    "utility",
    "membership",
    "representation",
    "separation",
    {
        "name": "uuef",
        "settings": {"downstream": {"held out": {"data": "digits", "labels": [0, 1, 2]}}, "picture": 40},
    },
    {"name": "relearning", "settings": {"steps": 6, "repetitions": 1}},
    {"name": "benign-finetuning", "settings": {"steps": 4}},
    "quantization",
    {"name": "pruning", "settings": {"shares": [0.5]}},
    {"name": "interpolation", "settings": {"points": 4}},
    "cost",
]


@pytest.fixture(scope="package")
def study(tmp_path_factory):
    recipe = {
        "name": "a small study",
        "model": {"name": "mlp", "settings": {"width": 32}},
        "training": {"epochs": 3},
        "forget": ["label=3", "fraction=0.1"],
        "methods": ["ssd", {"name": "finetune", "settings": {"epochs": 1}}],
        "audits": AUDITS,
        "controls": 2,
        "seeds": 2,
    }
    return compare(recipe, tmp_path_factory.mktemp("study") / "run", progress=False)


@pytest.fixture(scope="package")
def page(study, tmp_path_factory):
    place = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(study.reports, place, study.name, ["salun, label = 3, seed 1: it <b>diverged</b>"])
