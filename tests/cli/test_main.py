"""Help, errors and interrupts of the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

import palimpsest
from palimpsest.cli.main import RESUMABLE, VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_an_example_that_starts_with_it(run, verb):
    done = run(verb, "--help")
    assert done.exit_code == 0
    assert f"palimpsest {verb}" in done.output.partition("Example")[2]
    assert "--json" in done.output


@pytest.mark.parametrize("verb", [[], *[[verb] for verb in VERBS]])
def test_help_answers_at_once_and_imports_nothing_heavy(verb):
    code = (
        "import sys, time; start = time.process_time()\n"
        f"sys.argv = ['palimpsest', *{verb!r}, '--help']\n"
        "from palimpsest.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'pandas', 'altair', 'numpy', 'sklearn', 'sqlalchemy'} & set(sys.modules)\n"
        "print('seconds', time.process_time() - start, 'heavy', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1].split(" ", 3)
    assert last[3] == "[]"
    assert float(last[1]) < 1.0


def test_the_whole_process_answers_in_under_a_second(start):
    for _ in range(10):  # the best of several: others may be using the machine
        began = time.perf_counter()
        process = start("--help")
        output, _ = process.communicate(timeout=60)
        seconds = time.perf_counter() - began
        assert process.returncode == 0 and "compare" in output
        if seconds < 1.0:
            return
    pytest.fail(f"--help took {seconds:.1f} s")


def test_the_version_is_that_of_the_package(run):
    assert run("--version").output.strip() == palimpsest.__version__


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "--forget", "label=3", "--methods", "sssd"], "Unknown method 'sssd'. Did you mean 'ssd'?"),
        (["compare", "--forget", "label=3", "--methods", "ssd", "--data", "digit"], "Did you mean 'digits'?"),
        (["compare", "--forget", "label=3", "--methods", "ssd", "--audits", "utilty"], "Did you mean 'utility'?"),
        (["compare", "--forget", "label=13", "--methods", "ssd"], "No record has label = '13'"),
        (["compare", "--forget", "label", "--methods", "ssd"], "Write label=3, fraction=0.1"),
        (["compare", "--forget", "ids=nobody", "--methods", "ssd"], "not in the data: 'nobody'"),
        (["compare", "--forget", "fraction=1.5", "--methods", "ssd"], "strictly between 0 and 1"),
        (["compare", "--forget", "label=3", "--methods", "ssd", "--set", "trainig.epochs=3"], "'training'"),
        (["compare", "absent.yaml"], "Cannot read the recipe absent.yaml"),
        (["advise", "--have", "modle"], "Unknown need 'modle'. Did you mean 'model'?"),
        (["replicate", "sssd"], "Unknown replication 'sssd'"),
        (["report", "."], "holds no study"),
        (["methods", "--import", "no_such_module"], "Cannot import 'no_such_module'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_on_standard_error_and_exit_code_2(run, tmp_path, words, said):
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.stderr and done.stderr.startswith("Error: ")
    assert "Traceback" not in done.output and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debugging_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_DEBUG", "1")
    done = run("advise", "--have", "modle")
    assert isinstance(done.exception, palimpsest.PalimpsestError)


def test_a_study_without_a_request_or_methods_says_what_to_write(run):
    assert "--forget label=3" in run("compare", "--methods", "ssd").stderr
    done = run("compare", "--forget", "label=3")
    assert done.exit_code == 2 and "--methods ssd,scrub" in done.stderr


def test_a_table_is_json_on_demand(run):
    for verb in ("methods", "audits", "data", "models"):
        rows = json.loads(run(verb, "--json").stdout)
        assert len(rows) >= 3 and all(row["name"] for row in rows)
        assert rows[0]["name"] in run(verb).stdout
        assert f"| `{rows[0]['name']}` |" in run(verb, "--markdown").stdout


def test_an_interrupted_study_says_how_to_resume_and_does(start, tmp_path):
    words = [
        "compare", "--forget", "label=3", "--methods", "finetune", "--model", "mlp", "--epochs", "20",
        "--seeds", "1", "--controls", "2", "--audits", "utility", "--no-report", "--out", "run",
    ]  # fmt: skip
    process = start(*words)
    artifacts = tmp_path / "run" / "artifacts"
    limit = time.monotonic() + 60
    while len(list(artifacts.glob("*.safetensors"))) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resume with the same command" in errors and "Traceback" not in errors and output == ""
    kept = {path.name: path.stat().st_mtime_ns for path in artifacts.glob("*.safetensors")}
    again = start(*words)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and "finetune" in output
    rewritten = {name for name, moment in kept.items() if (artifacts / name).stat().st_mtime_ns != moment}
    assert len(kept) >= 2 and len(rewritten) <= 1  # the interrupt may fall between a model and its row
    assert set(RESUMABLE) <= set(VERBS)
