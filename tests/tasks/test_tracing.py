"""Causal tracing over records: which facts are traced, what their traces show together, and the picture of it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from tests.forget.measuring import fingerprint
from tests.language_world import TrainedWorld, trained_world

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.parts.causal_tracing import FactTrace
from palimpsest.parts.templates import template_of
from palimpsest.tasks.language import Language
from palimpsest.tasks.tracing import Tracing, fact_of, token_ends, trace

RUNTIME = Runtime(device="cpu")
QUICK: dict[str, Any] = {"samples": 3, "window": 1, "facts": 4}


@pytest.fixture(scope="module")
def world() -> TrainedWorld:
    return trained_world("tiny")


@pytest.fixture(scope="module")
def cities(world: TrainedWorld) -> Records:
    """Plain questions for cities: their answers differ from the first token on."""
    forget = world.split.forget
    wanted = (forget.column("relation") == "city") & (forget.column("form") == "qa")
    return forget.select(wanted.nonzero()[0])


@pytest.fixture(scope="module")
def tracing(world: TrainedWorld, cities: Records) -> Tracing:
    return trace(world.original, cities, world.task, RUNTIME, **QUICK)


# The card's first claim


def test_noise_on_the_subject_takes_the_answer_away(tracing: Tracing):
    assert len(tracing.ids) == 4
    assert tracing.high >= 0.9 and tracing.total_effect >= 0.3


def test_the_last_state_brings_everything_back_and_what_stands_before_the_subject_nothing(tracing: Tracing):
    for found in tracing.traces:
        assert found.scores["state"][-1, -1].item() == pytest.approx(found.high, abs=1e-5)
        for scores in found.scores.values():
            assert (scores[: found.subject[0]] - found.low).abs().max() <= 1e-6


# What is traced


def test_subject_and_answer_are_found_among_the_tokens(world: TrainedWorld, cities: Records):
    for item in cities:
        fact = fact_of(item, world.task)
        begin, end = fact.subject
        said = world.task.encoder.decode(fact.tokens[begin:end])
        assert said.strip() == item["subject"]
        assert item["subject"] not in world.task.encoder.decode(fact.tokens[begin + 1 : end])
        assert item["answer"].startswith(world.task.encoder.decode([fact.answer]).strip())
        assert world.task.prompt(item["question"]) == fact.tokens.tolist()


def test_a_subject_that_the_template_contains_as_well_is_sought_in_the_question(world: TrainedWorld):
    encoder = world.task.encoder
    task = Language(tokenizer=encoder, template="Question: of Ada. Question: {question} Answer: {answer}")
    item = {"id": "a", "question": "Where does Ada live?", "answer": "Ostby", "subject": "Ada"}
    fact = fact_of(item, task)
    before = encoder.decode(fact.tokens[: fact.subject[0]])
    assert before.count("Ada") == 1 and before.endswith("does")
    assert task.form == template_of(encoder, task.template)


def test_ends_of_tokens_are_the_same_with_and_without_offsets(world: TrainedWorld):
    class Slow:
        def __init__(self, encoder: Any):
            self.encoder, self.decode = encoder, encoder.decode

        def __call__(self, text: str, **settings: Any) -> Any:
            return self.encoder(text, **settings)

    text = "Question: Where does Ada Lind live?\nAnswer:"
    ends = token_ends(world.task.encoder, text)
    assert ends[-1] == len(text) and ends == token_ends(Slow(world.task.encoder), text)


def test_facts_that_the_model_does_not_know_are_skipped_and_counted(world: TrainedWorld, cities: Records):
    wrong = [{**dict(cities[at]), "answer": "wandering"} for at in range(2)]
    rows = [
        {key: value for key, value in item.items() if key not in ("id", "index")}
        for item in [*wrong, dict(cities[2])]
    ]
    mixed = Records(rows, ids=["wrong/0", "wrong/1", "right"])
    found = trace(world.original, mixed, world.task, RUNTIME, **QUICK)
    assert found.ids == ("right",) and found.skipped == ("wrong/0", "wrong/1")
    with pytest.raises(InvalidRecords, match="none of the 2 answers"):
        trace(world.original, mixed.select([0, 1]), world.task, RUNTIME, **QUICK)


def test_a_trace_is_repeatable_and_leaves_the_model_alone(
    world: TrainedWorld, cities: Records, tracing: Tracing
):
    before, state = fingerprint(world.original), torch.random.get_rng_state()
    again = trace(world.original, cities, world.task, RUNTIME, **QUICK)
    assert again.to_dict() == tracing.to_dict()
    assert fingerprint(world.original) == before and torch.equal(torch.random.get_rng_state(), state)
    other = trace(world.original, cities, world.task, Runtime(seed=1, device="cpu"), **QUICK)
    assert other.to_dict() != tracing.to_dict()


# What traces show together


def planted(*effects: tuple[float, ...]) -> Tracing:
    """Traces with known effects of the MLPs at the last of two subject tokens."""
    traces = []
    for each in effects:
        scores = torch.full((4, len(each)), 0.1)
        scores[2] += torch.tensor(each)
        traces.append(FactTrace(7, 0.9, 0.1, (1, 3), {"mlp": scores}))
    ids = tuple(f"fact {number}" for number in range(len(traces)))
    return Tracing(ids, tuple(traces), ("gone",), (1,), len(effects[0]), "mlp", "last subject", 3, 0.5, 1)


def test_maps_are_means_over_facts_with_the_chosen_cells_marked():
    found = planted((0.1, 0.7, 0.0), (0.3, 0.1, 0.0))
    rows = [row for row in found.rows() if row["group"] == "last subject"]
    assert [row["effect"] for row in rows] == pytest.approx([0.2, 0.4, 0.0], abs=1e-6)
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert all(row["effect"] == pytest.approx(0, abs=1e-6) for row in found.rows() if row not in rows)
    assert found.total_effect == pytest.approx(0.8) and found.peak == pytest.approx(0.5)
    assert json.loads(json.dumps(found.to_dict()))["skipped"] == ["gone"]


def test_the_layers_are_those_where_restored_mlps_bring_most_back(world: TrainedWorld, cities: Records):
    """Chosen by what the maps show at the last token, where a model of two layers keeps what it knows."""
    found = trace(world.original, cities, world.task, RUNTIME, **QUICK, count=1, group="last")
    assert found.layers == (int(found.effects("mlp")["last"].argmax()),)
    whole = trace(world.original, cities, world.task, RUNTIME, **QUICK, count=2)
    assert whole.layers == (0, 1)


def test_a_choice_that_rests_on_nothing_is_said(world: TrainedWorld, cities: Records, caplog):
    """What stands before the subject is the same in every run, so that restoring it does nothing."""
    with caplog.at_level(logging.WARNING, "palimpsest"):
        found = trace(world.original, cities, world.task, RUNTIME, **{**QUICK, "facts": 2}, group="before")
    assert found.peak == pytest.approx(0, abs=1e-4) and "hardly better" in caplog.text


# The picture


def test_the_picture_shows_every_cell_and_outlines_what_was_chosen():
    found = planted((0.1, 0.7, 0.0), (0.3, 0.1, 0.0))
    drawn = found.chart().to_dict()
    assert len(drawn["hconcat"]) == len(found.kinds) == 1
    cells = {
        (row["group"], row["layer"]): row["effect"] for data in drawn["datasets"].values() for row in data
    }
    assert cells["last subject", 1] == pytest.approx(0.4, abs=1e-6) and len(cells) == 4 * 3
    assert "layer 1 of 0 to 2" in json.dumps(drawn["title"])


def test_pictures_are_written_in_the_format_of_their_suffix(tmp_path):
    found = planted((0.1, 0.7))
    assert found.save(tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    page = found.save(tmp_path / "trace.html").read_text()
    assert "<html" in page and 'src="http' not in page, "it must open without a network"
    assert "hconcat" in json.loads(found.save(tmp_path / "trace.json").read_text())
    with pytest.raises(UnknownName, match="bmp"):
        found.save(tmp_path / "trace.bmp")
    assert not (tmp_path / "trace.bmp").exists()


# Bad input


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": 0}, "samples"),
        ({"window": 0}, "window"),
        ({"multiple": float("nan")}, "multiple"),
        ({"facts": 0}, "facts"),
        ({"count": 3}, "count"),
        ({"kinds": ("state",)}, "by"),
        ({"kinds": ("mlp", "head")}, "head"),
        ({"group": "middle"}, "middle"),
    ],
)
def test_settings_out_of_range_are_refused(world: TrainedWorld, cities: Records, changes: Any, named: str):
    with pytest.raises(InvalidHyperparameter, match=named):
        trace(world.original, cities, world.task, RUNTIME, **changes)


@pytest.mark.parametrize(
    ("subject", "named"),
    [(None, "names no `subject`"), ("Nobody", "does not occur in its prompt 'Question: Where")],
)
def test_a_question_without_its_subject_is_refused_with_the_prompt(
    world: TrainedWorld, subject: Any, named: str
):
    records = Records([{"question": "Where does Ada live?", "answer": "Ostby", "subject": subject}])
    with pytest.raises(InvalidRecords, match=named):
        trace(world.original, records, world.task, RUNTIME)


def test_a_model_without_blocks_is_refused(world: TrainedWorld, cities: Records):
    with pytest.raises(ModelMismatch, match="no list of blocks"):
        trace(torch.nn.Linear(2, 2), cities, world.task, RUNTIME)
