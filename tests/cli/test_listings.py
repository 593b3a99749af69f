"""Lists of methods and audits, and advice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from palimpsest.core.auditing import AUDITS
from palimpsest.core.needs import Need
from palimpsest.core.unlearner import UNLEARNERS

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_readme_is_the_one_that_the_command_prints():
    # In a process of its own: other tests register methods in this one.
    command = [sys.executable, "-m", "palimpsest.cli.main", "methods", "--markdown"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    readme = (ROOT / "README.md").read_text()
    begin, _, rest = readme.partition("<!-- methods:begin")
    assert begin and rest.partition("-->\n")[2].partition("\n<!-- methods:end -->")[0] == table, (
        "run make readme"
    )


def test_a_file_is_brought_up_to_date_between_its_marks(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nafter\n")
    assert run("methods", "--into", page).exit_code == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- methods:begin -->\n| name |") and text.endswith("end -->\nafter\n")
    assert "\nold\n" not in text and "| `ssd` |" in text
    page.write_text("no marks")
    assert run("methods", "--into", page).exit_code == 2 and page.read_text() == "no marks"


def test_every_method_and_audit_is_listed_with_its_card(run):
    methods = {row["name"]: row for row in json.loads(run("methods", "--json").stdout)}
    assert set(methods) == set(UNLEARNERS.names())
    for name, cls in UNLEARNERS.items():
        assert set(methods[name]["needs"]) == {need.value for need in cls.card.needs}
    audits = {row["name"]: row for row in json.loads(run("audits", "--json").stdout)}
    assert {name: row["code"] for name, row in audits.items()} == {
        name: cls.card.code for name, cls in AUDITS.items()
    }


def test_advice_says_yes_exactly_where_nothing_is_missing(run):
    have = {Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS}
    words = ",".join(need.value for need in have)
    rows = json.loads(run("advise", "--have", words, "--json").stdout)["methods"]
    for row in rows:
        needs = UNLEARNERS.get(row["name"]).card.needs
        assert (row["can_run"] == "yes") == (needs <= have)
        assert {item["need"] for item in row["missing"]} == {need.value for need in needs - have}
        assert all(item["remedy"] for item in row["missing"])
    order = [row["can_run"] for row in rows]
    assert order == sorted(order, key=["yes", "with a setting", "no"].index)


def test_advice_names_the_setting_that_stands_for_missing_data(run):
    rows = json.loads(run("advise", "--have", "model,forget-data", "--json").stdout)["methods"]
    lfssd = next(row for row in rows if row["name"] == "lfssd")
    assert lfssd["can_run"] == "with a setting" and lfssd["settings"] == ["full_importance"]
    assert "full_importance" in run("advise", "--have", "model,forget-data").stdout
    everything = run("advise", "--have", ",".join(need.value for need in Need), "--json")
    assert {row["can_run"] for row in json.loads(everything.stdout)["methods"]} == {"yes"}


def test_the_listing_of_learners_says_papers_streams_what_they_keep_and_settings(run):
    from palimpsest.retain import LEARNERS

    rows = {row["name"]: row for row in json.loads(run("methods", "--learners", "--json").stdout)}
    assert set(rows) == set(LEARNERS.names())
    for name, cls in LEARNERS.items():
        assert set(rows[name]["keeps"]) == {kept.value for kept in cls.card.keeps}
        assert rows[name]["streams"] == list(cls.card.scenarios) and rows[name]["summary"]
    assert "memory=200" in rows["er"]["settings"] and rows["er"]["link"].endswith("1902.10486")
    both = run("methods", "--markdown").stdout
    assert "| `der++` |" in both and "| `ssd` |" in both
