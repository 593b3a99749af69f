import pytest
import torch
from tests.forget.measuring import accuracy, fingerprint, kept_and_gone, tensors_of
from torch.nn import functional as F

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.forget.classifier.neggrad_plus import neggrad_plus_loss


def neggrad(model, request, task, **settings):
    return pal.forget(model, request, "neggrad-plus", task, seed=0, **settings)


@pytest.mark.parametrize("label", [0, 3, 7])
def test_the_defaults_forget_the_class_and_keep_the_rest(label, digits, digits_model, digits_task):
    """Measured: nothing of the class, 0.94 to 0.96 of the retained records."""
    request = pal.split(digits, pal.by_column("label", label), test=0.2, holdout=0.2, seed=0)
    unlearned = neggrad(digits_model, request, digits_task)
    kept, gone = kept_and_gone(unlearned, request)
    assert gone <= 0.1 and kept >= 0.9


def test_adam_at_training_pace_forgets_all_and_loses_utility(digits_model, class_request, digits_task):
    settings = {"optimizer": "adam", "lr": 1e-3, "epochs": 5, "clip": None}
    kept, gone = kept_and_gone(neggrad(digits_model, class_request, digits_task, **settings), class_request)
    assert gone <= 0.05
    assert kept < kept_and_gone(digits_model, class_request)[0] - 0.05


def test_without_clipping_the_published_settings_leave_chance(digits_model, class_request, digits_task):
    unlearned = neggrad(digits_model, class_request, digits_task, clip=None)
    assert accuracy(unlearned, class_request.retain) < 0.5


def test_beta_one_never_looks_at_the_forget_records(digits, digits_model, digits_task, class_request):
    """Only their number could matter, and it does not: the retained records define the epoch."""
    retain = class_request.retain
    other = pal.ForgetSplit(class_request.forget.select(range(50)), retain)
    first, second = (
        neggrad(digits_model, request, digits_task, beta=1.0, epochs=1, batch_size=1000)
        for request in (class_request, other)
    )
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    assert fingerprint(first) != fingerprint(digits_model)


def test_a_smaller_beta_forgets_more(digits_model, class_request, digits_task):
    found = [
        accuracy(neggrad(digits_model, class_request, digits_task, beta=beta, epochs=3), class_request.forget)
        for beta in (0.9, 0.99, 0.9999)
    ]
    assert found[0] < found[1] < found[2]


def test_one_step_is_that_of_the_formula_with_anchor(digits, digits_model, digits_task):
    request = pal.split(digits.select(range(100)), pal.by_column("label", 3), test=0, holdout=0)
    kept, gone = tensors_of(request.retain), tensors_of(request.forget)
    retain = F.cross_entropy(digits_model(kept["input"]), kept["label"])
    forget = F.cross_entropy(digits_model(gone["input"]), gone["label"])
    gradients = torch.autograd.grad(0.8 * retain - 0.2 * forget, list(digits_model.parameters()))
    settings = {"beta": 0.8, "lr": 0.1, "clip": None, "batch_size": 1000, "epochs": 1, "anchor": 7.0}
    unlearned = neggrad(digits_model, request, digits_task, **settings)
    for before, gradient, after in zip(
        digits_model.parameters(), gradients, unlearned.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before - 0.1 * gradient)


def test_the_anchor_holds_the_weights(digits_model, class_request, digits_task):
    def distance(anchor):
        after = neggrad(digits_model, class_request, digits_task, anchor=anchor)
        pairs = zip(digits_model.parameters(), after.parameters(), strict=True)
        return sum((one - two).square().sum().item() for one, two in pairs)

    assert distance(10.0) < 0.7 * distance(0.0)


def test_the_loss_is_the_weighted_difference():
    assert float(neggrad_plus_loss(torch.tensor(2.0), torch.tensor(3.0), 0.95)) == pytest.approx(1.75)


@pytest.mark.parametrize(
    "settings", [{"beta": -0.1}, {"beta": 1.1}, {"anchor": -1.0}, {"clip": 0.0}, {"forget_batch_size": 0}]
)
def test_settings_out_of_range_are_refused(settings, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match=next(iter(settings))):
        neggrad(digits_model, class_request, digits_task, **settings)
