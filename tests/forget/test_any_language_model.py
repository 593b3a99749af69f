"""Every method for language models on two kinds of decoder, under every rule and every scope."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.forget.every_language_method import (
    ANYWHERE,
    BY_GRADIENT,
    METHODS,
    MODELS,
    forget_quickly,
    little_world,
    untrained,
    wraps,
)
from tests.forget.measuring import changed, fingerprint

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch, UnknownName
from palimpsest.core.needs import Need
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget.rules import RULES

SCOPES = [
    "lora",
    {"name": "blocks", "layers": [1], "kind": "mlp"},
    pytest.param({"name": "named", "patterns": ["*.0.*"]}, marks=pytest.mark.slow),
    pytest.param({"name": "saliency", "share": 0.3}, marks=pytest.mark.slow),
]
DRAWN_PER_BATCH = ("flat", "knowledge-isolation")
"""Methods whose loss is of a batch as a whole, or draws anew for each."""
OTHER_RULES = [
    name if name == "gu" else pytest.param(name, marks=pytest.mark.slow)
    for name in RULES.names()
    if name != "sum"
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", sorted({*METHODS, *ANYWHERE}))
def test_every_method_takes_a_step_on_any_decoder_and_leaves_the_given_one_alone(name, kind):
    (request, task), model = little_world(), untrained(kind)
    before = fingerprint(model)
    unlearned = forget_quickly(model, request, name, task)
    assert fingerprint(model) == before and unlearned is not model
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in unlearned.modules())
    if wraps(unlearned):
        assert fingerprint(unlearned.plain) == before
    else:
        assert all(parameter.requires_grad for parameter in unlearned.parameters())
        assert type(unlearned) is type(model)
        assert any(moved.any() for moved in changed(model, unlearned).values())
    batch = task.collate([request.forget[0], request.retain[0]])
    with torch.no_grad():
        logits = task.logits(unlearned, batch)
    assert logits.shape == (*batch["input_ids"].shape, len(task.encoder)) and torch.isfinite(logits).all()
    assert len(task.generate(unlearned, ["Where does she live?"], max_new_tokens=2)[0]) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes_whatever_the_global_random_state(name):
    (request, task), model = little_world(), untrained("llama")
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        kept = torch.random.get_rng_state()
        found.append(fingerprint(forget_quickly(model, request, name, task)))
        assert torch.equal(torch.random.get_rng_state(), kept)
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", OTHER_RULES)
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_every_method_of_the_loop_runs_under_every_rule(name, rule):
    (request, task), model = little_world(), untrained("llama")
    unlearned = forget_quickly(model, request, f"{rule}+{name}", task)
    assert wraps(unlearned) or any(moved.any() for moved in changed(model, unlearned).values())
    same = forget_quickly(model, request, name, task, rule=rule)
    assert fingerprint(same) == fingerprint(unlearned)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_every_method_of_the_loop_runs_in_every_scope(name, scope):
    (request, task), model = little_world(), untrained("gpt2")
    unlearned = forget_quickly(model, request, name, task, scope=scope)
    if wraps(unlearned):
        assert fingerprint(unlearned.plain) == fingerprint(model)
        return
    moved = {part for part, mask in changed(model, unlearned).items() if mask.any()}
    assert moved
    if isinstance(scope, dict) and scope["name"] == "blocks":
        assert all(part.startswith("transformer.h.1.mlp") for part in moved)
    if isinstance(scope, dict) and scope["name"] == "named":
        assert all(".0." in part for part in moved)
    assert all(parameter.requires_grad for parameter in unlearned.parameters())


@pytest.mark.parametrize("name", [name for name in BY_GRADIENT if name not in DRAWN_PER_BATCH])
def test_two_half_batches_move_the_model_as_one_whole_batch_does(name):
    (request, task), model = little_world(), untrained("llama")
    common = {"optimizer": "sgd", "clip": None, "lr": 0.05, "weight_decay": 0.0}
    whole = forget_quickly(model, request, name, task, batch_size=8, **common)
    halves = forget_quickly(model, request, name, task, batch_size=4, accumulate=2, **common)
    if wraps(whole):
        whole, halves, model = whole.reinforced, halves.reinforced, whole.plain
    for one, two, start in zip(whole.parameters(), halves.parameters(), model.parameters(), strict=True):
        scale = float((one - start).abs().max().detach())
        assert torch.allclose(one, two, atol=2e-3 * scale + 1e-6)
    assert fingerprint(whole) != fingerprint(model)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if Need.RETAIN_DATA in UNLEARNERS.get(name).card.needs]
)
def test_without_retained_records_a_method_says_what_it_needs(name):
    request, task = little_world()
    with pytest.raises(MissingNeed, match="retain-data"):
        forget_quickly(untrained("llama"), ForgetSplit(request.forget), name, task)


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_language_are_for_language_only(name, digits_model, digits_task, class_request):
    with pytest.raises(ModelMismatch, match="language"):
        forget_quickly(digits_model, class_request, name, digits_task)


@pytest.mark.parametrize("name", BY_GRADIENT)
@pytest.mark.parametrize(
    "settings", [{"lr": 0.0}, {"epochs": 0}, {"batch_size": 0}, {"scope": "everything"}], ids=str
)
def test_settings_out_of_range_are_refused(name, settings):
    request, task = little_world()
    with pytest.raises((InvalidHyperparameter, UnknownName)):
        forget_quickly(untrained("llama"), request, name, task, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_stay_frozen(name):
    (request, task), partly = little_world(), copy.deepcopy(untrained("llama"))
    first = partly.get_input_embeddings().weight
    first.requires_grad_(False)
    unlearned = forget_quickly(partly, request, name, task)
    now = unlearned.get_input_embeddings().weight
    assert not now.requires_grad and torch.equal(now, first)


def test_a_second_request_is_served_on_what_the_first_left():
    (request, task), model = little_world(), untrained("llama")
    guarded = forget_quickly(model, request, "eco", task)
    twice = forget_quickly(guarded, request, "npo", task)
    assert wraps(twice) and fingerprint(twice.plain) != fingerprint(model)
    assert fingerprint(guarded.plain) == fingerprint(model)


def test_the_task_says_that_records_hold_their_own_labels():
    request, task = little_world()
    assert task.labelled and not request.forget.has_field("label")
    unlearned = forget_quickly(untrained("llama"), replace(request), "finetune", task)
    assert any(moved.any() for moved in changed(untrained("llama"), unlearned).values())
