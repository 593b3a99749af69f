"""Attacks on weights of language models: rounding (B4), adapters (B5), relearning (B1, B2), further training (B3, E3)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from palimpsest.audit.attacks.benign_finetuning import BenignFinetuning
from palimpsest.audit.attacks.interpolation import Interpolation
from palimpsest.audit.attacks.quantization import Quantization
from palimpsest.audit.attacks.relearning import Relearning, groups_of
from palimpsest.audit.attacks.rounding import quantize_model
from palimpsest.audit.attacks.unwrapping import Unwrapping
from palimpsest.audit.attacks.weights import hidden_weights
from palimpsest.audit.language.later_learning import LaterLearning
from palimpsest.audit.language.unrelated_finetuning import UnrelatedFinetuning, unrelated_texts
from palimpsest.core.auditing import build_audit
from palimpsest.core.errors import InvalidHyperparameter, UnknownName
from palimpsest.parts.lora import add_lora
from tests.audit import planted_language as planted
from tests.audit.language.conftest import found

QUICK = {"steps": 4, "every": 2, "batch_size": 8, "limit": 24, "share": 0.25}


def test_embeddings_and_head_are_not_rounded(tiny):
    model = copy.deepcopy(tiny.original)
    names = set(hidden_weights(model, tiny.task))
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert names == linear - {"lm_head.weight"}
    quantize_model(model, tiny.task, 3)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[name], tiny.original.state_dict()[name])
    assert not torch.equal(
        model.model.layers[0].mlp.up_proj.weight, tiny.original.model.layers[0].mlp.up_proj.weight
    )


def test_the_heads_of_all_models_inside_are_left_out(tiny):
    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.assistant = copy.deepcopy(tiny.original), copy.deepcopy(tiny.controls[0])
            self.classifier = torch.nn.Linear(4, 2)

    names = set(hidden_weights(Beside(), tiny.task))
    assert not names & {"inner.lm_head.weight", "assistant.lm_head.weight", "classifier.weight"}
    assert {"inner.model.layers.0.mlp.up_proj.weight", "assistant.model.layers.1.mlp.up_proj.weight"} <= names


def test_weights_moved_within_their_rounding_cells_are_the_originals_at_four_bits(run_on, tiny):
    shifted = copy.deepcopy(tiny.original)
    planted.within_rounding_cells(shifted, hidden_weights(shifted, tiny.task), bits=4)
    assert not torch.equal(
        shifted.model.layers[0].mlp.up_proj.weight, tiny.original.model.layers[0].mlp.up_proj.weight
    )
    rounded = [copy.deepcopy(model) for model in (shifted, tiny.original)]
    for model in rounded:
        quantize_model(model, tiny.task, 4)
    mine, first = (model.state_dict() for model in rounded)
    assert all(torch.equal(mine[name], tensor) for name, tensor in first.items())
    outcome = run_on(Quantization(bits=(4,), nf4=True), shifted)
    assert found(outcome, "forget_4bit").k == 1.0
    assert found(outcome, "codes_kept_4bit").value == 1.0
    assert found(outcome, "forget_nf4").valid


def test_an_adapter_that_was_not_merged_is_taken_off_and_all_is_there(run_on, tiny):
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(tiny.original), r=4)
    loud = planted.ascended(adapted, tiny.task, tiny.split.forget, steps=15, lr=1e-2)
    outcome = run_on(Unwrapping(), loud)
    plain = found(outcome, "inner_forget_accuracy")
    assert plain.k == 1.0 and plain.bears == "inside"
    assert found(outcome, "weights_kept").value == 1.0
    assert found(outcome, "inner_forget_accuracy_gain").value > 0.5


def test_a_few_subjects_are_relearned_and_only_others_measured(language_evidence):
    audit = Relearning(few=1, companions=0, steps=2, every=1, repetitions=3)
    group = groups_of(language_evidence)
    forget = language_evidence.records("forget")
    subject = forget.column("subject")
    for draw in audit.draws(language_evidence):
        told = {one for batch in draw.batches for one in batch["id"]}
        there = {str(subject[at]) for at, name in enumerate(forget.ids) if name in told}
        asked = {str(subject[at]) for at in draw.rest}
        assert len(there) == 1 and not there & asked and len(asked) == len(np.unique(group)) - 1
        assert draw.learned is not None
        assert {one for batch in draw.learned.batches for one in batch["subject"]} == there


def test_folds_relearn_every_subject_once(language_evidence):
    draws = Relearning(folds=2, companions=0, steps=1, every=1).draws(language_evidence)
    told = [{one for batch in draw.batches for one in batch["id"]} for draw in draws]
    assert len(draws) == 2 and not told[0] & told[1]
    assert told[0] | told[1] == set(language_evidence.records("forget").ids)


def test_the_rate_is_one_at_which_the_control_learns_the_relearned_facts(run_on, tiny):
    audit = Relearning(few=1, companions=1, steps=8, every=8, repetitions=1, batch_size=16)
    outcome = run_on(audit, tiny.original)
    area = found(outcome, "area")
    assert area.k == pytest.approx(1.0) and area.original is not None and area.original > 0.5
    assert area.controls[0] < 0.2  # facts of others cannot be inferred


@pytest.mark.parametrize(
    "audit",
    [
        BenignFinetuning(**QUICK),
        UnrelatedFinetuning(texts=10, **QUICK),
        LaterLearning(**QUICK),
        pytest.param(Interpolation(points=2), marks=pytest.mark.slow),
    ],
    ids=["benign", "unrelated", "later", "interpolation"],
)
def test_original_and_control_are_the_ends_of_the_scale(run_on, tiny, audit):
    for model, k in ((tiny.original, 1.0), (tiny.controls[0], 0.0)):
        scaled = [finding for finding in run_on(audit, model).findings if finding.k is not None]
        assert scaled
        for finding in scaled:
            assert finding.k == pytest.approx(k, abs=1e-9), finding


def test_k_is_followed_while_new_facts_are_learned(run_on, tiny):
    outcome = run_on(LaterLearning(**QUICK), tiny.original)
    curve = outcome.series["later"]
    assert [row["step"] for row in curve] == [0, 2, 4]
    assert curve[0]["k"] == pytest.approx(1.0) and curve[0]["original"] == 1.0
    assert found(outcome, "re_emergence").value == pytest.approx(0.0)
    assert "holdout" in found(outcome, "final").note


def test_unrelated_texts_are_different_and_name_no_one(tiny):
    texts = [item["text"] for item in unrelated_texts(100, np.random.default_rng(0))]
    assert len(set(texts)) == 100
    names = [person.name for person in tiny.world.persons]
    assert not any(name in text for name in names for text in texts)


def test_a_domains_budget_yields_to_what_is_set():
    assert build_audit("benign-finetuning", "language").steps == 20
    assert build_audit("benign-finetuning", "classification").steps == BenignFinetuning().steps
    assert build_audit("benign-finetuning", "language", {"steps": 7, "every": 1}).steps == 7
    with pytest.raises(UnknownName):
        build_audit("benign-finetuning", "language", {"stebs": 7})


@pytest.mark.parametrize("settings", [{"texts": 0}, {"steps": 0}, {"lr": 0.0}, {"share": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        UnrelatedFinetuning(**settings)
