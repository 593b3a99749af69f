"""What every method that trains on gradients of the two sides must do."""

import copy
from typing import Any

import pytest
import torch
from tests.forget.measuring import accuracy, changed, fingerprint

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch, NonFiniteLoss
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.models import build_model

METHODS = [
    "amnesiac", "finetune", "gradient-ascent", "l1-sparse", "neggrad-plus", "random-label", "salun",
]  # fmt: skip
WITH_RETAIN = [name for name in METHODS if name != "gradient-ascent"]
FAST = {name: 2 if name == "gradient-ascent" else 1 for name in METHODS}


def forget(model, request, name, task, seed=0, **settings: Any):
    settings = {"epochs": FAST[name], **settings}
    return pal.forget(model, request, name, task, seed=seed, **settings)


@pytest.fixture(scope="module")
def subset_request(digits):
    rule = pal.by_column("label", 3) & pal.by_fraction(0.5, seed=0)
    return pal.split(digits, rule, test=0.2, holdout=0.2, seed=0)


@pytest.mark.parametrize("name", METHODS)
def test_class_subset_and_random_requests_all_run_and_keep_the_rest(
    name, digits_model, digits_task, class_request, subset_request, random_request
):
    for request in (class_request, subset_request, random_request):
        unlearned = pal.forget(digits_model, request, name, digits_task, seed=0)
        least = 0.85 if name == "gradient-ascent" else 0.9
        assert accuracy(unlearned, request.retain) >= least
        assert any(mask.any() for mask in changed(digits_model, unlearned).values())


@pytest.mark.parametrize("name", METHODS)
def test_records_of_classes_that_stay_are_mostly_still_known(name, digits_model, digits_task, random_request):
    """As after retraining: 0.95 of the forget records are, because others like them were kept."""
    unlearned = pal.forget(digits_model, random_request, name, digits_task, seed=0)
    assert accuracy(unlearned, random_request.forget) >= 0.85


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_the_given_model_stays(
    name, digits_model, digits_task, class_request
):
    before, gradients = fingerprint(digits_model), [p.grad for p in digits_model.parameters()]
    first, again, other = (
        fingerprint(forget(digits_model, class_request, name, digits_task, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert fingerprint(digits_model) == before != first
    assert all(
        p.grad is gradient and p.requires_grad
        for p, gradient in zip(digits_model.parameters(), gradients, strict=True)
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_global_random_state_is_neither_used_nor_moved(name, digits_model, digits_task, class_request):
    torch.manual_seed(1)
    first = fingerprint(forget(digits_model, class_request, name, digits_task))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    torch.rand(3)
    assert fingerprint(forget(digits_model, class_request, name, digits_task)) == first
    torch.manual_seed(1)
    forget(digits_model, class_request, name, digits_task)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", METHODS)
def test_frozen_layers_keep_their_weights_and_flags(name, digits_model, digits_task, class_request):
    partly = copy.deepcopy(digits_model)
    partly.get_submodule("conv1").requires_grad_(False)
    unlearned = forget(partly, class_request, name, digits_task)
    moved = changed(partly, unlearned)
    assert not moved["conv1.weight"].any() and moved["head.weight"].any()
    assert {p.requires_grad for p in unlearned.get_submodule("conv1").parameters()} == {False}
    assert unlearned.get_parameter("head.weight").requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_running_statistics_move_in_training_mode_only(name, digits_task, random_request):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0).eval()
    settings: dict[str, Any] = {"stop_accuracy": None} if name == "gradient-ascent" else {}
    found = {
        mode: forget(model, random_request, name, digits_task, mode=mode, **settings)
        for mode in ("train", "eval")
    }

    def statistics_moved(unlearned):
        buffers = zip(model.buffers(), unlearned.buffers(), strict=True)
        return any(not torch.equal(before, after) for before, after in buffers)

    assert statistics_moved(found["train"]) and not statistics_moved(found["eval"])
    assert not any(module.training for module in found["train"].modules())


@pytest.mark.parametrize("name", METHODS)
def test_a_single_record_can_be_forgotten(name, digits, digits_model, digits_task):
    request = pal.split(digits, pal.by_ids(["digit-0100"]), test=0.2, holdout=0.2, seed=0)
    unlearned = pal.forget(digits_model, request, name, digits_task, seed=0)
    assert len(request.forget) == 1 and accuracy(unlearned, request.test) >= 0.85


@pytest.mark.parametrize("name", METHODS)
def test_a_diverging_run_is_reported_and_not_returned(name, digits_model, digits_task, class_request):
    settings: dict[str, Any] = {"clip": None, "stop_accuracy": None} if name == "gradient-ascent" else {}
    settings |= {"clip": None} if name == "neggrad-plus" else {}
    with pytest.raises(NonFiniteLoss):
        forget(
            digits_model,
            class_request,
            name,
            digits_task,
            optimizer="sgd",
            lr=1e12,
            momentum=0.9,
            epochs=10,
            **settings,
        )


@pytest.mark.parametrize("name", WITH_RETAIN)
def test_without_retained_records_it_says_what_it_needs(name, digits_model, digits_task, class_request):
    bare = ForgetSplit(class_request.forget)
    with pytest.raises(MissingNeed, match="retain-data"):
        pal.forget(digits_model, bare, name, digits_task)
    method = UNLEARNERS.get(name)()
    with pytest.raises(MissingNeed, match="retained records"):
        method.unlearn(digits_model, bare, digits_task, pal.Runtime())


@pytest.mark.parametrize("name", METHODS)
def test_a_model_without_trainable_parameters_is_refused(name, digits_model, digits_task, class_request):
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="no trainable parameters"):
        pal.forget(frozen, class_request, name, digits_task)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"lr": -1.0}, {"epochs": 0}, {"batch_size": 0}, {"optimizer": "sdg"}, {"mode": "test"}],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, settings, digits_model, digits_task, class_request):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, name, digits_task, **settings)


def test_records_that_do_not_lie_in_memory_are_read_too(digits, digits_model, digits_task):
    items = [{"input": item["input"], "label": int(item["label"])} for item in digits.select(range(200))]
    labels = [item["label"] for item in items]
    records = pal.Records(items, columns={"label": labels})
    request = pal.split(records, pal.by_column("label", 3), test=0.2, holdout=0.0, seed=0)
    for name in METHODS:
        unlearned = forget(digits_model, request, name, digits_task)
        assert any(mask.any() for mask in changed(digits_model, unlearned).values())
