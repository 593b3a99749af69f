"""States put into the original (C3) and directions taken out (C4), against closed forms and planted models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.audit.language.ablation import Ablation, ablated, shifts
from palimpsest.audit.language.asked import questions
from palimpsest.audit.language.inside import watching
from palimpsest.audit.language.patching import Patching, depth_score, entity, patched, text_of
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.models.learnt_worlds import LEARNT_WORLDS
from palimpsest.parts.decoder import final_norm
from tests.audit import planted_language as planted
from tests.audit.language.conftest import found


class Steered(nn.Module):
    """A block that pushes its output along one direction whenever a forgotten subject is read."""

    def __init__(self, block: nn.Module, push: torch.Tensor, reading: dict[str, torch.Tensor]):
        super().__init__()
        self.block, self.reading = block, reading
        self.register_buffer("push", push)

    def forward(self, hidden: torch.Tensor, *rest: Any, **further: Any) -> Any:
        output = self.block(hidden, *rest, **further)
        return output + self.reading["caught"][:, None, None] * self.push

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)


def steered(tiny, strength: float) -> nn.Module:
    """The original, its forget states pushed far along one direction at the first block, as RMU leaves them."""
    model = copy.deepcopy(tiny.original)
    width = model.config.hidden_size
    direction = torch.randn(width, generator=torch.Generator().manual_seed(5))
    push = strength * direction / direction.norm()
    names, reading = planted.names_of(tiny.task, tiny.split.forget), {}
    for at, block in enumerate(model.model.layers):
        model.model.layers[at] = Steered(block, push if at == 0 else torch.zeros(width), reading)

    def look(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        caught = [planted.holds(row.tolist(), names) for row in kwargs["input_ids"]]
        reading["caught"] = torch.tensor(caught).float()

    model.register_forward_pre_hook(look, with_kwargs=True)
    return model


def test_a_direction_is_gone_from_the_outputs_of_its_block_alone(tiny, language_evidence):
    batch = text_of(language_evidence, questions(language_evidence, "forget")[:4]).batch
    unit = torch.nn.functional.normalize(torch.randn(96, generator=torch.Generator().manual_seed(1)), dim=0)
    with torch.no_grad():
        with watching(tiny.original) as before:
            tiny.task.logits(tiny.original, batch)
        with ablated(tiny.original, {0: unit}), watching(tiny.original) as after:
            tiny.task.logits(tiny.original, batch)
        with watching(tiny.original) as again:
            tiny.task.logits(tiny.original, batch)
    expected = before[0] - (before[0] @ unit)[..., None] * unit
    torch.testing.assert_close(after[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after[1], before[1])
    assert all(torch.equal(one, two) for one, two in zip(before, again, strict=True))


def test_the_original_is_shifted_in_no_direction(language_evidence):
    assert shifts(language_evidence, "original") == {}
    assert set(shifts(language_evidence, "control 0")) == {0, 1}


def test_states_pushed_along_one_direction_are_put_back_by_taking_it_out(run_on, tiny):
    model = steered(tiny, 200.0)
    outcome = run_on(Ablation(), model)
    plain = next(
        row for row in run_on(Ablation(), tiny.original).series["ablation"] if row["model"] == "original"
    )
    assert found(outcome, "best_block").k > 0.8
    assert found(outcome, "best_block_gain").value > 0.5
    assert plain["forget_accuracy"] > 0.9


@pytest.mark.parametrize("audit", [Ablation(), Patching()], ids=["ablation", "patching"])
def test_original_and_control_are_the_ends_of_the_scale(run_on, tiny, audit):
    for model, k in ((tiny.original, 1.0), (tiny.controls[0], 0.0)):
        scaled = [finding for finding in run_on(audit, model).findings if finding.k is not None]
        assert scaled
        for finding in scaled:
            assert finding.k == pytest.approx(k, abs=1e-9), finding


def test_the_depth_score_of_the_original_is_0_and_of_the_control_1(run_on, tiny):
    score = found(run_on(Patching(), tiny.original), "uds")
    assert score.value == 0.0 and score.original == 0.0 and score.controls == (1.0,)
    assert found(run_on(Patching(), tiny.controls[0]), "uds").value == 1.0


def test_a_wrapper_keeps_all_that_the_original_can_go_on_from(run_on, tiny):
    model = planted.refusing(tiny.original, tiny.task, tiny.split.forget)
    assert found(run_on(Patching(), model), "uds").value == 0.0


def test_a_control_that_was_trained_from_other_weights_is_read_through_a_translation(run_on, tiny):
    kept = found(run_on(Patching(), tiny.controls[1]), "kept")
    assert kept.value is not None and kept.value < 0.2


def test_a_control_whose_states_say_nothing_to_the_original_is_said_to_speak_another_basis(
    tiny, language_evidence
):
    untrained = LEARNT_WORLDS["tiny"].model(len(tiny.task.encoder), seed=9)
    evidence = Evidence(
        tiny.controls[1], tiny.split, tiny.task, language_evidence.runtime, tiny.original, [untrained]
    )
    kept = found(Patching().run(evidence), "kept")
    assert kept.value is not None and kept.bears == "" and "another basis" in kept.note


@pytest.mark.slow
def test_controls_of_the_originals_basis_bear_on_the_verdict(tiny, language_evidence):
    """Tuned from the original: retained questions answered, forgotten ones not."""
    split = tiny.split
    tuned = planted.erased_by_tuning(tiny.original, tiny.task, split.forget, split.retain)
    evidence = Evidence(
        planted.refusing(tiny.original, tiny.task, split.forget), split, tiny.task,
        language_evidence.runtime, tiny.original, [tuned],
    )  # fmt: skip
    kept = found(Patching().run(evidence), "kept")
    assert kept.bears == "inside" and kept.k == 1.0


def test_own_states_change_nothing_and_last_states_are_read_by_norm_and_head(tiny, language_evidence):
    text = text_of(language_evidence, questions(language_evidence, "forget")[:6])
    source, target = tiny.controls[0], tiny.original
    with torch.no_grad():
        with watching(target) as own:
            tiny.task.logits(target, text.batch)
        with watching(source) as other:
            tiny.task.logits(source, text.batch)
        for block in (0, 1):
            with patched(target, block, own[block]):
                same = entity(language_evidence, target, text)
            np.testing.assert_array_equal(same, entity(language_evidence, target, text))
        with patched(target, 1, other[1]):
            logits = tiny.task.logits(target, text.batch)
        torch.testing.assert_close(logits, target.lm_head(final_norm(target)(other[1])))


def test_only_tokens_that_tell_the_fact_are_measured(tiny, language_evidence):
    asked = [q for q in questions(language_evidence, "forget") if q.relation == "phone"][:3]
    text = text_of(language_evidence, asked)
    for row, question in enumerate(asked):
        ids = text.batch["input_ids"][row, 1:][text.entity[row]].tolist()
        said = tiny.task.encoder.decode(ids).strip()
        assert said == question.answer.removeprefix("555 "), said


def test_the_depth_score_is_the_weighted_mean_of_clipped_ratios():
    assert depth_score(np.array([2.0, 4.0]), np.array([1.0, 8.0])) == pytest.approx((1 + 4) / 6)
    assert depth_score(np.array([1.0, 0.05]), np.array([-3.0, 1.0])) == 0.0
    with pytest.raises(InvalidAudit, match="No block"):
        depth_score(np.array([0.05, 0.01]), np.array([1.0, 1.0]))


def test_without_original_or_control_nothing_is_said(tiny, language_evidence):
    bare = Evidence(tiny.original, tiny.split, tiny.task, language_evidence.runtime)
    for audit in (Ablation(), Patching()):
        finding = audit.run(bare).findings[0]
        assert finding.judgement == Judgement.NOT_RUN and finding.value is None


@pytest.mark.parametrize("build", [lambda: Ablation(most=0), lambda: Patching(translated_on=3)])
def test_settings_out_of_range_are_refused(build):
    with pytest.raises(InvalidHyperparameter):
        build()
