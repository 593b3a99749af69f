import math

import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, NonFinite
from palimpsest.core.runtime import Runtime
from palimpsest.models import build_model
from palimpsest.parts.importance import (
    Measure,
    check_importance,
    measure_importance,
    output_sensitivity,
    quadratic_anchor,
    squared_gradients,
)

TASK = pal.tasks.Classification()


def batch(x, y):
    return {"input": x, "label": y, "id": [str(i) for i in range(len(x))]}


def some_batches(sizes, shape=(1, 8, 8), classes=10, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        batch(torch.rand(n, *shape, generator=random), torch.randint(classes, (n,), generator=random))
        for n in sizes
    ]


def gradients(model, objective):
    model.zero_grad()
    objective.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def loop_over_samples(model, batches, objective, magnitude):
    total, count = {}, 0
    for whole in batches:
        for i in range(len(whole["input"])):
            one = batch(whole["input"][i : i + 1], whole["label"][i : i + 1])
            for name, gradient in gradients(model, objective(model, one)).items():
                total[name] = total.get(name, 0) + magnitude(gradient)
            count += 1
    return {name: value / count for name, value in total.items()}


def squared_norm(model, one):
    return model(one["input"]).square().sum()


def loss(model, one):
    return nn.functional.cross_entropy(model(one["input"]), one["label"])


def close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "small_resnet"])
def test_per_sample_fisher_is_that_of_a_loop_over_samples(name):
    model = build_model(name, (1, 8, 8), 10, seed=1).eval()
    batches = some_batches([7, 3])
    found = squared_gradients(model, batches, TASK, "per-sample", chunk=4)
    close(found, loop_over_samples(model, batches, loss, torch.square))


@pytest.mark.parametrize("name", ["mlp", "small_resnet"])
def test_per_sample_sensitivity_is_that_of_a_loop_over_samples(name):
    model = build_model(name, (1, 8, 8), 10, seed=1).eval()
    batches = some_batches([5, 2])
    found = output_sensitivity(model, batches, TASK, "per-sample", chunk=3)
    close(found, loop_over_samples(model, batches, squared_norm, torch.abs))


def test_batch_mean_fisher_of_logistic_regression_has_its_closed_form():
    model = nn.Linear(2, 3)
    batches = some_batches([4, 1], shape=(2,), classes=3)
    expected = torch.zeros(3, 2)
    for item in batches:
        x, y = item["input"], item["label"]
        error = model(x).softmax(1).detach() - nn.functional.one_hot(y, 3)
        expected += (error.T @ x / len(x)) ** 2
    found = squared_gradients(model, batches, TASK)
    torch.testing.assert_close(found["weight"], expected / 2)


def test_batch_mean_sensitivity_of_a_linear_map_has_its_closed_form():
    model = nn.Linear(2, 3, bias=False)
    batches = some_batches([4, 1], shape=(2,), classes=3)
    expected = sum(
        (2 * model(item["input"]).detach().T @ item["input"] / len(item["input"])).abs() for item in batches
    )
    found = output_sensitivity(model, batches, TASK)
    torch.testing.assert_close(found["weight"], expected / 2)


def test_a_batch_of_one_makes_both_averagings_agree():
    model = build_model("mlp", (1, 8, 8), 10, seed=2)
    batches = some_batches([1, 1, 1])
    close(squared_gradients(model, batches, TASK), squared_gradients(model, batches, TASK, "per-sample"))


def test_sensitivity_never_reads_a_label():
    class Guarded(dict):
        def __getitem__(self, key):
            assert key != "label", "the label was read"
            return super().__getitem__(key)

    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    plain = some_batches([6, 2])
    found = output_sensitivity(model, [Guarded(item) for item in plain], TASK)
    close(found, output_sensitivity(model, plain, TASK))
    unlabelled = [{key: value for key, value in item.items() if key != "label"} for item in plain]
    close(
        output_sensitivity(model, unlabelled, TASK, "per-sample"),
        output_sensitivity(model, plain, TASK, "per-sample"),
    )


@pytest.mark.parametrize("averaging", ["batch-mean", "per-sample"])
def test_measuring_leaves_mode_buffers_and_gradients_alone(averaging):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0)
    model.train()
    stem, blocks = model.get_submodule("stem").eval(), model.get_submodule("blocks")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    squared_gradients(model, some_batches([8]), TASK, averaging)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not stem.training and blocks.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_have_no_importance():
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    model.hidden.requires_grad_(False)
    for averaging in ("batch-mean", "per-sample"):
        assert set(squared_gradients(model, some_batches([3]), TASK, averaging)) == {
            "head.weight",
            "head.bias",
        }


def test_no_records_and_no_parameters_are_refused():
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    with pytest.raises(InvalidRecords, match="at least one record"):
        squared_gradients(model, [], TASK)
    with pytest.raises(ModelMismatch, match="no trainable parameters"):
        squared_gradients(model.requires_grad_(False), some_batches([2]), TASK)


def test_outputs_that_are_no_tensor_have_no_sensitivity():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x), x

    with pytest.raises(ModelMismatch, match="tuple"):
        output_sensitivity(Pair(), some_batches([2], (2,), 2), TASK)


def test_importances_are_checked_against_the_model():
    model = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    check_importance(good, model)
    with pytest.raises(ModelMismatch, match="lack 1 parameters: 'bias'"):
        check_importance({"weight": good["weight"]}, model)
    with pytest.raises(ModelMismatch, match="shape"):
        check_importance({**good, "bias": torch.ones(4)}, model)
    with pytest.raises(NonFinite, match="bias"):
        check_importance({**good, "bias": torch.tensor([1.0, math.nan, 0])}, model)
    with pytest.raises(ModelMismatch, match="negative"):
        check_importance({**good, "bias": -good["bias"]}, model)


def test_measures_compare_batches_only_where_batches_are_averaged():
    assert Measure(batch_size=32).comparable_with(Measure(batch_size=32))
    assert not Measure(batch_size=32).comparable_with(Measure(batch_size=64))
    assert not Measure(shuffle=True).comparable_with(Measure(shuffle=False))
    assert not Measure(of="loss").comparable_with(Measure(of="output"))
    one, other = (Measure(averaging="per-sample", batch_size=size) for size in (32, 64))
    assert one.comparable_with(other)
    with pytest.raises(InvalidHyperparameter, match="averaged"):
        Measure(averaging="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidHyperparameter, match="batch_size"):
        Measure(batch_size=0)


def test_the_order_of_records_only_matters_if_batches_are_averaged(digits_task, class_request, digits_model):
    def measured(averaging, seed):
        measure = Measure("loss", averaging, 64, shuffle=True)
        records = class_request.forget
        return measure_importance(digits_model, records, digits_task, Runtime(seed=seed), measure)[
            "head.bias"
        ]

    assert not torch.allclose(measured("batch-mean", 0), measured("batch-mean", 1), rtol=1e-3)
    torch.testing.assert_close(measured("per-sample", 0), measured("per-sample", 1), rtol=1e-4, atol=1e-9)


def test_the_anchor_is_half_the_weighted_squared_distance():
    model = nn.Linear(1, 2, bias=False)
    anchor = {"weight": model.weight.detach() - torch.tensor([[1.0], [2.0]])}
    assert quadratic_anchor(model, anchor).item() == pytest.approx(2.5)
    weighted = quadratic_anchor(model, anchor, {"weight": torch.tensor([[4.0], [1.0]])})
    assert weighted.item() == pytest.approx(4.0)
    weighted.backward()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[4.0], [2.0]]))
