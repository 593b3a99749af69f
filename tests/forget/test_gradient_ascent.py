import pytest
import torch
from tests.forget.measuring import accuracy, changed, fingerprint, kept_and_gone

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.needs import Need
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget.classifier.gradient_ascent import whole_classes


def ascend(model, request, task, **settings):
    return pal.forget(model, request, "gradient-ascent", task, seed=0, **settings)


@pytest.mark.parametrize("label", [0, 3, 7])
def test_the_defaults_forget_the_class_and_spare_the_model(label, digits, digits_model, digits_task):
    """Measured: 0.01, 0.14 and 0.09 of the forget records; 0.94, 0.92 and 0.90 of the retained ones."""
    request = pal.split(digits, pal.by_column("label", label), test=0.2, holdout=0.2, seed=0)
    unlearned = ascend(digits_model, request, digits_task)
    assert accuracy(unlearned, request.forget) <= 0.3
    assert accuracy(unlearned, request.retain) >= 0.85


def test_it_keeps_less_than_random_labels_do(digits_model, class_request, digits_task):
    ascended = ascend(digits_model, class_request, digits_task)
    relabelled = pal.forget(digits_model, class_request, "random-label", digits_task, seed=0)
    gap = kept_and_gone(relabelled, class_request)[0] - kept_and_gone(ascended, class_request)[0]
    assert gap > 0.01


def test_without_a_bound_it_wrecks_the_model(digits_model, random_request, digits_task):
    bounded = ascend(digits_model, random_request, digits_task)
    unbounded = ascend(digits_model, random_request, digits_task, stop_accuracy=None)
    assert accuracy(bounded, random_request.test) >= 0.9
    assert accuracy(unbounded, random_request.test) < 0.6


def test_a_bound_that_is_already_met_changes_nothing(digits_model, class_request, digits_task):
    for settings in ({"stop_accuracy": 1.0}, {"stop_accuracy": None, "stop_loss": 1e-9}):
        unlearned = ascend(digits_model, class_request, digits_task, **settings)
        assert fingerprint(unlearned) == fingerprint(digits_model)


def test_a_higher_loss_bound_goes_further(digits_model, class_request, digits_task):
    def loss(bound):
        unlearned = ascend(digits_model, class_request, digits_task, stop_accuracy=None, stop_loss=bound)
        tensors = class_request.forget.tensors
        return torch.nn.functional.cross_entropy(unlearned(tensors["input"]), tensors["label"]).item()

    assert 0.3 < loss(0.5) < loss(2.0) < loss(6.0)


def test_one_plain_step_is_ascent_on_the_mean_loss(digits_model, class_request, digits_task):
    tensors = class_request.forget.tensors
    loss = torch.nn.functional.cross_entropy(digits_model(tensors["input"]), tensors["label"])
    gradients = torch.autograd.grad(loss, list(digits_model.parameters()))
    settings = {"epochs": 1, "batch_size": 1000, "lr": 1e-3, "optimizer": "sgd", "clip": None}
    unlearned = ascend(digits_model, class_request, digits_task, **settings)
    for before, gradient, after in zip(
        digits_model.parameters(), gradients, unlearned.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before + 1e-3 * gradient)


def test_the_gradient_is_clipped_to_its_norm(digits_model, class_request, digits_task):
    settings = {"epochs": 1, "batch_size": 1000, "lr": 1.0, "optimizer": "sgd", "clip": 1e-3}
    unlearned = ascend(digits_model, class_request, digits_task, **settings)
    before = torch.cat([p.detach().flatten() for p in digits_model.parameters()])
    after = torch.cat([p.detach().flatten() for p in unlearned.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=0.05)


def test_it_needs_no_retained_records(digits_model, class_request, digits_task):
    assert UNLEARNERS.get("gradient-ascent").card.needs == {Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS}
    unlearned = ascend(digits_model, ForgetSplit(class_request.forget), digits_task)
    assert any(mask.any() for mask in changed(digits_model, unlearned).values())
    assert accuracy(unlearned, class_request.forget) <= 0.3


def test_whole_classes_are_told_from_records_of_classes_that_stay(digits, class_request, random_request):
    assert whole_classes(class_request) and not whole_classes(random_request)
    half = pal.split(digits, pal.by_column("label", 3) & pal.by_fraction(0.5), test=0.2, holdout=0.2)
    assert not whole_classes(half)
    assert not whole_classes(pal.split(digits, pal.by_column("label", 3) | pal.by_fraction(0.1)))
    assert whole_classes(pal.split(digits, pal.by_column("label", 3, 5)))
    assert whole_classes(ForgetSplit(class_request.forget))
    assert not whole_classes(ForgetSplit(random_request.forget))


@pytest.mark.parametrize(
    "settings", [{"stop_accuracy": "never"}, {"stop_accuracy": 1.5}, {"stop_loss": 0.0}, {"clip": 0.0}]
)
def test_bounds_out_of_range_are_refused(settings, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match=next(iter(settings))):
        ascend(digits_model, class_request, digits_task, **settings)
