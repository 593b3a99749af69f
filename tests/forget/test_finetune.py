import pytest
import torch
from tests.forget.measuring import accuracy, kept_and_gone, tensors_of

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.parts.parameters import snapshot


def finetune(model, request, task, **settings):
    return pal.forget(model, request, "finetune", task, seed=0, **settings)


@pytest.mark.parametrize("label", [0, 3, 7])
def test_five_epochs_leave_most_of_the_class_known(label, digits, digits_model, digits_task):
    """Measured for the three classes: 0.97, 0.83 and 0.97 of the test records of the class."""
    request = pal.split(digits, pal.by_column("label", label), test=0.2, holdout=0.2, seed=0)
    kept, gone = kept_and_gone(finetune(digits_model, request, digits_task, epochs=5), request)
    assert gone >= 0.6
    assert kept >= kept_and_gone(digits_model, request)[0] - 0.02


def test_a_large_learning_rate_forgets_more(digits_model, class_request, digits_task):
    small = finetune(digits_model, class_request, digits_task, lr=0.001)
    large = finetune(digits_model, class_request, digits_task, lr=0.02, momentum=0.9)
    assert accuracy(large, class_request.forget) < accuracy(small, class_request.forget) - 0.3


def test_the_anchor_holds_the_weights(digits_model, class_request, digits_task):
    start = snapshot(digits_model)

    def distance(anchor):
        settings = {"anchor": anchor, "mode": "eval", "weight_decay": 0.0}
        after = snapshot(finetune(digits_model, class_request, digits_task, **settings))
        return sum(float((after[name] - start[name]).square().sum()) for name in start)

    assert distance(10.0) < 0.5 * distance(0.0)


def test_one_plain_step_is_descent_on_the_mean_loss(digits, digits_model, digits_task):
    request = pal.split(digits.select(range(60)), pal.by_column("label", 3), test=0, holdout=0)
    tensors = tensors_of(request.retain)
    loss = torch.nn.functional.cross_entropy(digits_model(tensors["input"]), tensors["label"])
    gradients = torch.autograd.grad(loss, list(digits_model.parameters()))
    settings = {"epochs": 1, "batch_size": 1000, "lr": 0.1, "weight_decay": 0.0}
    unlearned = finetune(digits_model, request, digits_task, **settings)
    for before, gradient, after in zip(
        digits_model.parameters(), gradients, unlearned.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before - 0.1 * gradient)


def test_a_negative_anchor_is_refused(digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match="anchor"):
        finetune(digits_model, class_request, digits_task, anchor=-1.0)


def test_whoever_calls_may_have_switched_gradients_off(digits_model, class_request, digits_task):
    plain = snapshot(finetune(digits_model, class_request, digits_task))
    with torch.no_grad():
        quiet = snapshot(finetune(digits_model, class_request, digits_task))
    start = snapshot(digits_model)
    assert all(torch.equal(plain[name], quiet[name]) for name in plain)
    assert not all(torch.equal(plain[name], start[name]) for name in plain)
