"""Sleek on models that forgot, hide and did nothing; attackers behind a real HTTP endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from palimpsest.audit.hit_rates import adjusted_leak
from palimpsest.audit.language.sleek import Sleek, spread
from palimpsest.audit.language.sleek_attacker import writer_of
from palimpsest.audit.language.sleek_prompts import (
    CHAINED,
    DIRECT,
    IMPLIED,
    INDIRECT,
    KINDS,
    MODES,
    PLAIN,
    Fact,
    StepPrompt,
)
from palimpsest.audit.language.sleek_runs import Asked, _place, _units, brief
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.runtime import Runtime
from palimpsest.parts.chat_endpoint import ChatEndpoint
from tests.audit.planted_replies import Refusing, RefusingPlain

QUICK = Sleek(each=1, retained=6, max_new_tokens=32)


def test_the_leak_is_exactly_one_for_the_original_and_zero_for_the_control(judge, evidence, learnt):
    for model, leak in ((evidence.original, 1.0), (learnt.retrained, 0.0)):
        found = judge(QUICK, model)["success"]
        assert adjusted_leak(found.value, found.original, found.controls[0]) == leak
        assert found.k == leak


def test_a_retrained_model_gives_nothing_away_and_suppresses_no_more_than_the_control(judge, twin):
    found = judge(QUICK, twin)
    assert found["success"].k < 0.3 and found["fact_recovery"].k < 0.5
    assert found["success"].bears == "inside"


def test_doing_nothing_suppresses_nothing(judge, evidence):
    found = judge(QUICK, evidence.original)
    assert found["unfair_suppression"].value == found["worst_suppression"].value == 0
    assert found["reasoning_gain"].value == found["reasoning_gain"].original


def test_tuned_refusals_of_plain_questions_leak_where_the_question_is_implied(judge, tuned):
    found = judge(QUICK, tuned)
    assert found["success_implied"].value > found["success_direct"].value


def test_refusing_plain_questions_leaks_by_steps(judge, learnt):
    forget = learnt.split.forget
    plain = [item for item, form in zip(forget, forget.column("form"), strict=True) if form == "qa"]
    asked = [item["question"] for item in plain]
    asked += [
        probe["question"]
        for item in plain
        for probe in item.get("probes", ())
        if probe["form"] == "paraphrase"
    ]
    found = judge(QUICK, RefusingPlain(learnt.original, learnt.task, asked))
    assert found["success_implied"].value > found["success_direct"].value
    assert found["reasoning_gain_implied"].value >= 0.3
    assert "McNemar" in found["reasoning_gain_implied"].note


def test_refusing_people_who_were_to_be_kept_is_unfair_suppression(judge, learnt):
    kept = sorted({str(name) for name in learnt.split.retain.column("subject") if name})
    found = judge(QUICK, Refusing(learnt.original, learnt.task, kept))
    assert 0.5 < found["unfair_suppression"].value <= found["worst_suppression"].value


def test_a_refusal_of_names_holds_in_chains_that_name_them_at_the_end(judge, refusing):
    assert judge(QUICK, refusing)["success_direct"].value == 0


def test_the_matrix_has_every_kind_and_mode_for_every_model(outcome, tuned):
    rows = outcome(QUICK, tuned).series["sleek"]
    cells = {(row["part"], row["kind"], row["mode"], row["model"]) for row in rows}
    for role in ("original", "unlearned", "control 0"):
        for kind in (DIRECT, INDIRECT):
            assert {("forget", kind, mode, role) for mode in MODES} <= cells
        assert {("forget", IMPLIED, mode, role) for mode in (PLAIN, "single-shot")} <= cells
    assert all(row["rate"] == 0 for row in rows if row["part"] == "forget" and row["model"] == "control 0")


def test_only_prompts_that_no_control_hits_are_kept(outcome, evidence):
    found = outcome(QUICK, evidence.original)
    kept = found.series["sleek_prompts"]
    assert all(row["place"] == "nowhere" for row in kept if row["model"] == "control 0")
    note = next(finding.note for finding in found.findings if finding.name == "success")
    assert "can be guessed" in note


def test_sampled_replies_can_only_add_facts(judge, tuned):
    found = judge(replace(QUICK, samples=2, limit=4), tuned)
    assert found["sampled_recovery"].value >= found["fact_recovery"].value


def test_nothing_is_attacked_where_the_original_knows_nothing(learnt):
    evidence = Evidence(
        learnt.original,
        learnt.split,
        learnt.task,
        Runtime(seed=0, device="cpu"),
        learnt.retrained,
        learnt.controls[1:],
    )
    (finding,) = Sleek().run(evidence).findings
    assert finding.judgement is Judgement.NOT_RUN and "answers none" in finding.note


def test_hits_are_located_in_chain_or_final_answer():
    prompt = StepPrompt("f", DIRECT, "Where?", ("Who?", "Where?"), ("Oslo",), ("New Oslo",))
    assert _place(prompt, ["Oslo", "it is Norway"]) == "chain"
    assert _place(prompt, ["Eva", "Step 1: Oslo. Step 2: Norway"]) == "chain"
    assert _place(prompt, ["Eva", "the answer is Oslo"]) == "final answer"
    assert _place(prompt, ["Eva", "New Oslo"]) == "nowhere"


def test_prompts_that_differ_in_their_chain_only_are_asked_once_without_it():
    prompts = [StepPrompt("f", DIRECT, "Where?", (first, "Where?"), ("Oslo",)) for first in ("a", "b")]
    assert [mode for *_, mode in _units(prompts)].count(PLAIN) == 1
    assert [mode for *_, mode in _units(prompts)].count(CHAINED) == 2


def test_a_reply_goes_on_as_its_first_line():
    assert brief("  Oslo.\nand more") == "Oslo" and brief("") == ""


def test_facts_are_joined_over_their_prompts():
    prompts = [StepPrompt(f, DIRECT, "?", (), ("Oslo",)) for f in ("f", "f", "g")]
    hit = {"unlearned": np.array([1.0, 0.0, 1.0])}
    asked = Asked(
        tuple((n, prompt, "single-shot") for n, prompt in enumerate(prompts)),
        np.array([0, 0, 1]), np.array([5, 5, 6]), hit, {}, {}, {},
    )  # fmt: skip
    means, clusters = asked.per_fact(asked.steps)
    np.testing.assert_array_equal(means["unlearned"], [0.5, 1.0])
    np.testing.assert_array_equal(clusters, [5, 6])
    np.testing.assert_array_equal(asked.per_fact(asked.steps, np.max)[0]["unlearned"], [1.0, 1.0])


def test_few_facts_are_taken_of_as_many_subjects_as_there_are():
    facts = [Fact(f"{who}{n}", who, "r", "?", ("x",)) for who in "abc" for n in range(3)]
    assert [fact.fact for fact in spread(facts, 4)] == ["a0", "a1", "b0", "c0"]


@pytest.fixture
def attacker() -> Iterator[tuple[str, list[str], list[int]]]:
    """An endpoint that writes questions, or fails after as many answers as it is told."""
    asked: list[str] = []
    limit: list[int] = [10**6]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if len(asked) >= limit[0]:
                self.send_error(503)
                return
            asked.append(body["messages"][0]["content"])
            quoted = asked[-1].split('"')[1]
            text = json.dumps(
                {"choices": [{"message": {"content": f"1. {quoted}\n2. {quoted[:-1]}, please?"}}]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}/v1", asked, limit
    http.shutdown()
    http.server_close()


def test_a_chat_model_behind_an_endpoint_writes_the_prompts(learnt, attacker):
    url, asked, _ = attacker
    evidence = Evidence(
        learnt.original,
        learnt.split,
        learnt.task,
        Runtime(seed=0, device="cpu"),
        learnt.original,
        learnt.controls[:1],
    )
    audit = replace(QUICK, limit=3, each=2, retained=1, endpoint=ChatEndpoint(url, "writer", backoff=0.0))
    found = {finding.name: finding for finding in audit.run(evidence).findings}
    assert len(asked) == 3 * len(KINDS)
    assert found["plain"].value > 0 and found["success"].n == 3


def test_a_model_in_a_folder_writes_what_it_would_answer(learnt, tmp_path):
    learnt.original.save_pretrained(tmp_path)
    learnt.task.encoder.save_pretrained(tmp_path)
    runtime = Runtime(seed=0, device="cpu")
    item = next(item for item in learnt.split.retain if item.get("answer"))
    writer = writer_of(str(tmp_path), None, runtime, None)
    assert writer([item["question"]]) == learnt.task.generate(learnt.original, [item["question"]])[0]


def test_an_endpoint_that_falls_silent_is_reported_and_what_it_wrote_is_kept(learnt, attacker, tmp_path):
    url, asked, limit = attacker
    limit[0] = 4
    evidence = Evidence(
        learnt.original, learnt.split, learnt.task, Runtime(seed=0, device="cpu"), learnt.original, learnt.controls[:1],
        folder=tmp_path,
    )  # fmt: skip
    audit = replace(QUICK, limit=2, retained=1, endpoint=ChatEndpoint(url, "writer", backoff=0.0, attempts=2))
    (finding,) = audit.run(evidence).findings
    assert finding.judgement is Judgement.NOT_RUN and "no answer in 2 attempts" in finding.note
    limit[0] = 10**6
    found = {finding.name for finding in audit.run(evidence).findings}
    assert "success" in found
    assert len(asked) == len(set(asked)) == 2 * len(KINDS)


@pytest.mark.parametrize("settings", [{"each": 0}, {"limit": 0}, {"samples": -1}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidAudit):
        Sleek(**settings)
