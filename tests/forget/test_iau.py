from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tests.forget.measuring import accuracy, fingerprint, kept_and_gone, tensors_of
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    MissingNeed,
    ModelMismatch,
    NonFiniteLoss,
)
from palimpsest.forget.classifier.iau import IAU
from palimpsest.models import build_model


def iau(model, request, task, **settings):
    return pal.forget(model, request, "iau", task, **settings)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_of(model, records):
    tensors = tensors_of(records)
    return F.cross_entropy(model(tensors["input"]), tensors["label"])


def gradient(model, records):
    """Gradient of the mean loss over all records in one batch, by plain backward."""
    model = copy.deepcopy(model).eval()
    loss_of(model, records).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def small():
    """Twenty records, six of them to be forgotten, and an untrained network in double precision."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(20, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=generator)
    model = build_model("small_cnn", (1, 4, 4), 3, seed=0, width=2, hidden=5).double()
    records = pal.Records(TensorDataset(x, y))
    return model, pal.ForgetSplit(records.select(range(6)), records.select(range(6, 20)))


# The step itself


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_the_plain_step_is_the_difference_of_two_mean_gradients(small, digits_task, batch_size):
    model, request = small
    runtime = pal.Runtime(device="cpu", batch_size=batch_size)
    after = iau(model, request, digits_task, optimizer="sgd", lr=0.3, runtime=runtime)
    g = gradient(model, request.retain) - gradient(model, request.forget)
    torch.testing.assert_close(flat(after), flat(model) - 0.3 * g)


def test_the_step_of_a_fresh_adam_is_nearly_a_sign(small, digits_task):
    model, request = small
    g = gradient(model, request.retain) - gradient(model, request.forget)
    after = iau(model, request, digits_task, lr=0.01)
    torch.testing.assert_close(flat(after), flat(model) - 0.01 * g / (g.abs() + 1e-8))


def test_without_the_correction_it_is_ascent_and_reads_no_retained_record(small, digits_task):
    model, request = small
    alone = replace(request, retain=None)
    after = iau(model, alone, digits_task, optimizer="sgd", lr=0.3, correction=False)
    torch.testing.assert_close(flat(after), flat(model) + 0.3 * gradient(model, request.forget))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_optimiser_steps_exactly_as_often_as_said(small, digits_task, optimizer, steps):
    model, request = small
    settings = {} if steps == 1 else {"steps": steps}  # one is the default
    counted = []
    handle = register_optimizer_step_pre_hook(lambda *_: counted.append(1))
    try:
        iau(model, request, digits_task, optimizer=optimizer, **settings)
    finally:
        handle.remove()
    assert len(counted) == steps


def test_every_further_step_takes_its_gradients_anew(small, digits_task):
    model, request = small
    once = iau(model, request, digits_task, optimizer="sgd", lr=0.3)
    twice = iau(once, request, digits_task, optimizer="sgd", lr=0.3)
    together = iau(model, request, digits_task, optimizer="sgd", lr=0.3, steps=2)
    torch.testing.assert_close(flat(together), flat(twice))
    fixed = flat(model) + 2 * (flat(once) - flat(model))
    assert not torch.allclose(flat(together), fixed, rtol=1e-6)


def test_a_further_request_steps_from_the_current_weights_with_the_records_still_retained(small, digits_task):
    model, first = small
    after = iau(model, first, digits_task, optimizer="sgd", lr=0.3)
    second = pal.ForgetSplit(first.retain.select(range(4)), first.retain.select(range(4, 14)))
    g = gradient(after, second.retain) - gradient(after, second.forget)
    found = iau(after, second, digits_task, optimizer="sgd", lr=0.3)
    torch.testing.assert_close(flat(found), flat(after) - 0.3 * g)


# Against exact truths, in convex problems


@pytest.fixture(scope="module")
def convex(digits, digits_task):
    """Regularised logistic regression: the optimum on all records, and the way to that without sixty of them."""
    ids = np.random.default_rng(0).choice(digits.ids, 60, replace=False).tolist()
    request = pal.split(digits, pal.by_ids(ids), test=0.3, holdout=0.0, seed=0)
    tensors = tensors_of(digits)
    double = pal.Records(
        TensorDataset(tensors["input"].flatten(1).double(), tensors["label"]), ids=digits.ids
    )
    trained = np.isin(np.asarray(digits.ids, dtype=object), request.train.ids)
    gone = np.isin(np.asarray(digits.ids, dtype=object), ids)
    request = pal.ForgetSplit(double.select(gone), double.select(trained & ~gone))
    return optimum(double.select(trained)), optimum(request.retain), request


def optimum(records, decay=1e-2):
    """Minimum of the mean loss + decay/2 ||W||^2, by scikit-learn's L-BFGS."""
    tensors = tensors_of(records)
    x, y = tensors["input"].numpy(), tensors["label"].numpy()
    solved = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)
    model = nn.Linear(x.shape[1], len(solved.classes_)).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(solved.coef_))
        model.bias.copy_(torch.from_numpy(solved.intercept_))
    return model


def test_the_direction_leads_towards_the_retrained_optimum(convex, digits_task):
    model, retrained, request = convex
    way = flat(retrained) - flat(model)
    step = flat(iau(model, request, digits_task, optimizer="sgd", lr=1.0)) - flat(model)
    cosine = float(step @ way / (step.norm() * way.norm()))
    assert cosine >= 0.3
    best = (step @ way) / (step @ step) * step
    assert (way - best).norm() <= 0.95 * way.norm()
    signs = flat(iau(model, request, digits_task)) - flat(model)
    assert float(signs @ way / (signs.norm() * way.norm())) >= 0.2


def test_the_forget_loss_rises_as_exact_influence_has_it(convex, digits_task):
    model, _, request = convex
    x = torch.cat([tensors_of(part)["input"] for part in (request.forget, request.retain)])
    p = model(x).softmax(1).detach()
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    # the Hessian of softmax regression in closed form: mean of (diag(p) - p p^T) (x) (x x^T), plus the decay
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nij,na,nb->iajb", curvature, ones, ones) / len(x)
    hessian = hessian.reshape(p.shape[1] * ones.shape[1], -1) + 1e-2 * torch.eye(650, dtype=x.dtype)
    parts = torch.autograd.grad(loss_of(model, request.forget), [model.weight, model.bias])
    g = torch.cat([parts[0], parts[1][:, None]], 1).flatten()
    influence = torch.linalg.solve(hessian, len(request.forget) * g).reshape(10, 65) / len(x)
    removed = copy.deepcopy(model)
    with torch.no_grad():
        removed.weight += influence[:, :64]
        removed.bias += influence[:, 64]
    lr = float(
        influence.norm()
        / (flat(iau(model, request, digits_task, optimizer="sgd", lr=1)) - flat(model)).norm()
    )
    stepped = iau(model, request, digits_task, optimizer="sgd", lr=lr)
    before = loss_of(model, request.forget)
    assert loss_of(removed, request.forget) > before + 0.01
    assert loss_of(stepped, request.forget) > before + 0.01


def test_at_an_exact_optimum_the_correction_only_lengthens_the_ascent(digits_task):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=generator)  # labels by chance: no regularisation is needed
    records = pal.Records(TensorDataset(x, y))
    request = pal.ForgetSplit(records.select(range(15)), records.select(range(15, 60)))
    model = nn.Linear(3, 3).double()
    solver = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    solver.step(closure)
    corrected = flat(iau(model, request, digits_task, optimizer="sgd", lr=0.1)) - flat(model)
    alone = flat(iau(model, request, digits_task, optimizer="sgd", lr=0.1, correction=False)) - flat(model)
    torch.testing.assert_close(corrected, (1 + 15 / 45) * alone, rtol=1e-4, atol=1e-7)


# What it does to a network


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [("adam", (1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 1e-2)), ("sgd", (0.02, 0.05, 0.1, 0.2, 0.3))],
)
def test_one_step_forgets_a_class_at_a_price_that_grows_with_the_rate(
    optimizer, rates, digits_model, class_request, digits_task
):
    curve = [
        kept_and_gone(
            iau(digits_model, class_request, digits_task, optimizer=optimizer, lr=lr), class_request
        )
        for lr in rates
    ]
    kept, gone = zip(*curve, strict=True)
    assert any(g <= 0.15 and k >= 0.93 for k, g in curve), curve
    noise = 0.01  # three test records
    assert all(b <= a + noise for series in (kept, gone) for a, b in pairwise(series)), curve
    assert gone[0] >= 0.6 and gone[-1] == 0.0 and kept[-1] < kept[0] - 0.1


def test_the_correction_saves_utility_when_steps_are_repeated(digits, digits_model, digits_task):
    gains = []  # in test accuracy on the other digits, at the first rate that forgets a digit
    for label in range(10):
        request = pal.split(digits, pal.by_column("label", label), test=0.2, holdout=0.2, seed=0)
        for lr in (0.7e-3, 1e-3, 1.3e-3, 1.7e-3, 2.3e-3, 3.3e-3):
            kept, gone = kept_and_gone(iau(digits_model, request, digits_task, lr=lr, steps=3), request)
            if gone <= 0.15:
                alone = iau(digits_model, request, digits_task, lr=lr, steps=3, correction=False)
                gains.append(kept - kept_and_gone(alone, request)[0])
                break
    assert len(gains) == 10 and np.mean(gains) >= 0.01 and np.median(gains) >= 0.01, gains


def test_part_of_a_class_and_random_records_raise_their_loss_more_than_the_rest(
    digits, digits_model, random_request, digits_task
):
    part = pal.by_column("label", 3) & pal.by_fraction(0.3, seed=0)
    for request in (pal.split(digits, part, test=0.2, holdout=0.2, seed=0), random_request):
        after = iau(digits_model, request, digits_task)
        with torch.no_grad():
            rise, price = (
                float(loss_of(after, records) - loss_of(digits_model, records))
                for records in (request.forget, request.retain)
            )
        assert rise > 0 and rise > 2 * price
        assert accuracy(after, request.retain) >= 0.9


def test_gradient_restriction_keeps_the_gradients_of_single_records_small(class_request, digits_task):
    start = build_model("mlp", (1, 8, 8), 10, seed=0)
    lengths, accuracies = [], []
    for alpha in (0.0, 0.05):
        model = pal.train(
            start, class_request.train, digits_task, epochs=50, lr=3e-3, seed=0, gradient_restriction=alpha
        )
        singles = [class_request.train.select([i]) for i in range(0, len(class_request.train), 3)]
        lengths.append(np.array([gradient(model, single).norm().item() for single in singles]))
        accuracies.append(accuracy(model, class_request.test))
    plain, restricted = lengths
    assert restricted.mean() <= 0.97 * plain.mean()
    assert np.quantile(restricted, 0.99) <= 0.85 * np.quantile(plain, 0.99)
    assert accuracies[1] >= accuracies[0] - 0.01


# What it leaves alone, and what it tells


def test_the_model_given_stays_and_nothing_is_random(digits_model, class_request, digits_task):
    before = fingerprint(digits_model)
    one, two = (fingerprint(iau(digits_model, class_request, digits_task, seed=seed)) for seed in (0, 1))
    assert one == two != before
    assert fingerprint(digits_model) == before


def test_frozen_tensors_and_batch_norm_statistics_stay(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0, width=4).train()
    model.stem.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    after = iau(model, class_request, digits_task).state_dict()
    kept = [name for name in before if name.startswith("stem.") or "running" in name or "num_batches" in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_step_tells_what_it_was_made_of(small, digits_task, caplog):
    model, request = small
    with caplog.at_level(logging.INFO, logger="palimpsest"):
        after, (report,) = IAU(lr=0.3, optimizer="sgd").unlearn_and_report(
            model, request, digits_task, pal.Runtime(device="cpu")
        )
    retain, forget = gradient(model, request.retain), gradient(model, request.forget)
    assert (report.forget_records, report.retain_records) == (6, 14)
    assert (report.optimizer, report.lr, report.gradient_restriction) == ("sgd", 0.3, None)
    assert report.forget_norm == pytest.approx(float(forget.norm()))
    assert report.retain_norm == pytest.approx(float(retain.norm()))
    assert report.cosine == pytest.approx(float(retain @ forget / (retain.norm() * forget.norm())))
    assert report.distance == pytest.approx(float((flat(after) - flat(model)).norm()))
    assert report.gradient_seconds > 0 and report.step_seconds > 0
    assert "step 1 of 1" in caplog.text and "cosine" in caplog.text


def test_the_report_says_how_the_original_was_trained(class_request, digits_task):
    for alpha in (0.0, 0.005):
        model = build_model("mlp", (1, 8, 8), 10, seed=0)
        model = pal.train(model, class_request.train, digits_task, epochs=1, gradient_restriction=alpha)
        method = IAU(correction=False, steps=2)
        _, reports = method.unlearn_and_report(model, class_request, digits_task, pal.Runtime())
        assert [report.gradient_restriction for report in reports] == [alpha, alpha]
        assert all(report.cosine is None and report.retain_records == 0 for report in reports)
        assert reports[1].distance > reports[0].distance


def test_the_cosine_of_a_zero_gradient_is_not_a_number(small, digits_task):
    model, request = small
    blind = copy.deepcopy(model).requires_grad_(False)
    blind.register_parameter("unused", nn.Parameter(torch.ones(1, dtype=torch.float64)))
    with torch.no_grad():
        blind.head.weight.zero_()
    blind.fc.weight.requires_grad_()  # a zero head lets no gradient through to it
    after, (report,) = IAU().unlearn_and_report(blind, request, digits_task, pal.Runtime())
    assert math.isnan(report.cosine) and report.distance == 0.0
    assert torch.equal(flat(after), flat(blind))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_large_vision_models_take_one_step(name, digits_task):
    settings = {"img_size": 32} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 4, seed=0, **settings).train()
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(12, 3, 32, 32, generator=generator), torch.arange(12) % 4)
    request = pal.split(pal.Records(data), pal.by_column("label", 3), test=0.0, holdout=0.0)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    after = iau(model, request, digits_task, lr=1e-4)
    assert all(torch.equal(buffers[name], value) for name, value in after.named_buffers())
    moved = (flat(after) - flat(model)).abs()
    assert 0 < moved.max() <= 1.01e-4
    model.eval()
    with torch.no_grad():
        assert loss_of(after, request.forget) > loss_of(model, request.forget)


# Bad input


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"steps": 0}, "steps"),
        ({"optimizer": "adamw"}, "adamw"),
    ],
)
def test_settings_out_of_range_are_refused(setting, named, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match=named):
        iau(digits_model, class_request, digits_task, **setting)


def test_the_correction_needs_retained_records_and_something_must_train(
    digits_model, class_request, digits_task
):
    alone = replace(class_request, retain=None)
    with pytest.raises(MissingNeed, match="retain-data"):
        iau(digits_model, alone, digits_task)
    with pytest.raises(MissingNeed, match="correction"):
        IAU().unlearn(digits_model, alone, digits_task, pal.Runtime())
    with pytest.raises(ModelMismatch, match="trainable"):
        iau(copy.deepcopy(digits_model).requires_grad_(False), class_request, digits_task)


def test_labels_out_of_range_regressors_and_losses_that_are_not_finite_are_refused(
    class_request, digits_task
):
    with pytest.raises(InvalidLabels, match="0 to 9"):
        iau(build_model("mlp", (1, 8, 8), 9), class_request, digits_task)
    with pytest.raises(ModelMismatch, match="at least 2 classes"):
        iau(build_model("mlp", (1, 8, 8), 1), class_request, digits_task)
    extreme = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        extreme[1].bias.fill_(-3e38)[0] = 3e38  # finite logits so far apart that a log probability is not
    with pytest.raises(NonFiniteLoss):
        iau(extreme, class_request, digits_task)
