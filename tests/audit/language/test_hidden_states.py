"""Hidden states: where they are read, what the probe (C1) and the lens (C2) say of models of known fate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from palimpsest.audit.language.asked import greedy_hits, questions
from palimpsest.audit.language.hidden_probe import HiddenProbe, folds_of, logistic, nearest, ridge, shared
from palimpsest.audit.language.inside import head_role, network_of, opening, spread_out, states
from palimpsest.audit.language.logit_lens import LogitLens, lens
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.finding import Judgement
from palimpsest.models.small_llama import small_llama
from tests.audit import planted_language as planted
from tests.audit.language.conftest import found


@pytest.fixture(scope="module")
def head_alone(tiny):
    """Only `lm_head` was trained: answers are gone from the outputs, hidden states are the original's."""
    split = tiny.split
    return planted.head_suppressed(tiny.original, tiny.task, split.forget, split.retain)


def test_an_answer_opens_where_wrong_ones_first_differ(language_evidence):
    task = language_evidence.task
    for question in questions(language_evidence, "forget"):
        begun = opening(task, question)
        gold = task.encode(question.question, question.answer)[0]
        wrong = [task.encode(question.question, other)[0] for other in question.wrong]
        assert (*begun.ids, begun.token) == tuple(gold[: len(begun.ids) + 1])
        assert all(tuple(other[: len(begun.ids)]) == begun.ids for other in wrong)
        assert any(other[: len(begun.ids) + 1] != gold[: len(begun.ids) + 1] for other in wrong)
        if question.relation == "phone":  # all begin with 555
            assert len(begun.ids) > len(task.prompt(question.question))


def test_states_are_those_that_the_model_itself_gives_out(language_evidence, tiny):
    asked = questions(language_evidence, "forget")[:5]
    seen = states(language_evidence, "original", asked)
    for at, question in enumerate(asked):
        ids = torch.tensor([opening(tiny.task, question).ids])
        with torch.no_grad():
            hidden = tiny.original(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(seen[0, at], hidden[1][0, -1], rtol=1e-4, atol=1e-4)


def test_a_wrapper_is_left_out_before_anything_is_read(language_evidence, tiny):
    evidence = language_evidence.judging(planted.refusing(tiny.original, tiny.task, tiny.split.forget))
    asked = questions(evidence, "forget")[:3]
    assert torch.equal(states(evidence, "unlearned", asked), states(evidence, "original", asked))
    assert type(network_of(evidence, "unlearned")) is type(tiny.original)


def test_a_suppressed_head_leaves_states_probe_and_lens_as_they_were(
    language_evidence, run_on, tiny, head_alone
):
    evidence = language_evidence.judging(head_alone)
    asked = questions(evidence, "forget")
    assert greedy_hits(evidence, "unlearned", asked).mean() < 0.2
    assert greedy_hits(evidence, "original", asked).mean() > 0.8
    mine, first = (states(evidence, role, asked) for role in ("unlearned", "original"))
    torch.testing.assert_close(mine, first, rtol=0, atol=1e-6)
    assert head_role(evidence, "unlearned") == "original"
    probe = found(run_on(HiddenProbe(), head_alone), "any_value")
    assert probe.k == pytest.approx(1.0, abs=1e-9) and probe.original is not None and probe.original > 0.8
    outcome = run_on(LogitLens(), head_alone)
    assert found(outcome, "best").k == pytest.approx(1.0, abs=1e-9)
    own, before = found(outcome, "best_own_head"), found(outcome, "best")
    assert own.value is not None and before.value is not None and own.value < before.value - 0.3


def test_a_model_made_anew_is_read_through_its_own_head(language_evidence, tiny):
    assert head_role(language_evidence.judging(tiny.controls[1]), "unlearned") == "unlearned"
    assert head_role(language_evidence, "unlearned") == "original"


@pytest.mark.parametrize("audit", [HiddenProbe(), LogitLens()], ids=["probe", "lens"])
def test_a_retrained_model_shows_nothing_that_the_control_does_not(run_on, tiny, audit):
    for finding in run_on(audit, tiny.controls[1]).findings:
        if finding.bears == "inside":
            assert finding.k is not None and abs(finding.k) < 0.3, finding


@pytest.mark.parametrize("audit", [HiddenProbe(), LogitLens()], ids=["probe", "lens"])
def test_original_and_control_are_the_ends_of_the_scale(run_on, tiny, audit):
    for model, k in ((tiny.original, 1.0), (tiny.controls[0], 0.0)):
        scaled = [finding for finding in run_on(audit, model).findings if finding.k is not None]
        assert scaled
        for finding in scaled:
            assert finding.k == pytest.approx(k, abs=1e-9), finding


def test_curves_run_over_all_blocks_with_k_of_the_unlearned_model(run_on, tiny):
    rows = run_on(LogitLens(), tiny.original).series["lens"]
    own = [row for row in rows if row["head"] == "own"]
    assert {row["block"] for row in own} == {0, 1} and len(own) == 2 * 3
    assert all(row["k"] == pytest.approx(1.0) for row in own if row["model"] == "unlearned")
    probes = run_on(HiddenProbe(), tiny.original).series["probes"]
    assert {row["block"] for row in probes} == {0, 1}


def test_an_untrained_network_is_read_no_better_than_chance(run_on, tiny):
    network = small_llama(len(tiny.task.encoder), width=96, layers=2, heads=4, seed=7)
    finding = found(run_on(HiddenProbe(), network), "any_value")
    assert finding.value is not None and finding.value < 0.45


def test_relations_without_shared_values_are_said_to_be_unreadable_by_classes(run_on, tiny):
    finding = found(run_on(HiddenProbe(fewest=50), tiny.original), "shared_values")
    assert finding.judgement == Judgement.NOT_RUN and "50 retained subjects share" in finding.note


def test_only_values_of_several_retained_subjects_are_classes(language_evidence):
    fit, test = (questions(language_evidence, part) for part in ("retain", "forget"))
    for fewest in (2, 3):
        sides = shared(fit, test, fewest)
        values = {(q.relation, q.answer) for q in sides.fit}
        for value in values:
            assert len({q.subject for q in fit if (q.relation, q.answer) == value}) >= fewest
        assert {(q.relation, q.answer) for q in sides.test} <= values


def test_a_subject_lies_in_one_fold(language_evidence):
    asked = questions(language_evidence, "retain")
    fold = folds_of(asked, 5, np.random.default_rng(0))
    for subject in {question.subject for question in asked}:
        assert len({fold[at] for at, question in enumerate(asked) if question.subject == subject}) == 1
    assert set(fold) == set(range(5))


@pytest.mark.parametrize("shape", [(30, 5), (6, 20)], ids=["more rows", "more columns"])
def test_the_linear_map_is_ridge_regression(shape):
    random = np.random.default_rng(0)
    x, y, rows = (
        random.normal(size=shape),
        random.normal(size=(shape[0], 3)),
        random.normal(size=(4, shape[1])),
    )
    size = x.std(0)
    expected = Ridge(alpha=2.0).fit((x - x.mean(0)) / size, y).predict((rows - x.mean(0)) / size)
    np.testing.assert_allclose(ridge(x, y, 2.0, rows), expected, rtol=1e-8)


def test_a_tie_is_no_right_answer():
    candidates = [np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])]
    assert nearest(np.array([[1.0, 0.0]]), candidates).tolist() == [0.0]


def test_the_classifier_reads_what_is_there_and_survives_a_single_class():
    x = np.array([[0.0], [0.1], [5.0], [5.1]])
    assert logistic(x, np.array([3, 3, 8, 8]), 1.0, np.array([[0.2], [4.9]])).tolist() == [3, 8]
    assert logistic(x, np.array([3, 3, 3, 3]), 1.0, np.array([[0.2]])).tolist() == [3]


def test_rank_counts_the_tokens_that_are_likelier():
    log_p = torch.tensor([[[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]]).log()
    value, rank = lens(log_p, torch.tensor([1, 0]))
    np.testing.assert_allclose(np.exp(value), [[0.2, 0.5]], rtol=1e-6)
    assert rank.tolist() == [[2.0, 1.0]]


def test_blocks_are_spread_with_the_last_among_them():
    for count in range(1, 30):
        for most in range(1, 12):
            chosen = spread_out(count, most)
            assert chosen[-1] == count - 1 and len(set(chosen)) == len(chosen) == min(count, most)


@pytest.mark.parametrize("settings", [{"folds": 1}, {"fewest": 1}, {"most": 0}, {"limit": 3}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        HiddenProbe(**settings)
