from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch
from palimpsest.forget.classifier.influence import slopes, woodfisher
from palimpsest.models import build_model


def accuracy(model, records):
    with torch.no_grad():
        return (model(records.tensors["input"]).argmax(1) == records.tensors["label"]).float().mean().item()


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def flat_gradient(model, x, y):
    """Gradient of the mean loss as one vector, by plain backward."""
    model = copy.deepcopy(model).eval()
    F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def flat(tensors):
    return torch.cat([value.flatten() for value in tensors.values()])


def recursion(model, x, y, v, n):
    """The published recursion, record by record."""
    k, o, updates = v.clone(), None, 0
    for i in range(len(x)):
        g = flat_gradient(model, x[i : i + 1], y[i : i + 1])
        if o is None:
            o = g.clone()
            continue
        t = o @ g
        k = k - (k @ g) / (n + t) * o
        o = o - t / (n + t) * o
        updates += 1
        if updates == n + 1:
            break
    return k


@pytest.fixture(scope="module")
def small():
    """Twenty records, ten to be forgotten first, and an untrained network in double precision."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(20, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=generator)
    model = build_model("small_cnn", (1, 4, 4), 3, seed=0, width=2, hidden=5).double()
    records = pal.Records(TensorDataset(x, y))
    return model, pal.ForgetSplit(records.select(range(6)), records.select(range(6, 20)))


def batches(records, size):
    tensors = records.tensors
    for start in range(0, len(records), size):
        part = {name: value[start : start + size] for name, value in tensors.items()}
        yield part | {"id": records.ids[start : start + size]}


@pytest.mark.parametrize("n", [1, 4, 1000])
@pytest.mark.parametrize("size", [1, 3, 14])
def test_the_two_numbers_follow_the_recursion_record_by_record(small, n, size):
    model, request = small
    generator = torch.Generator().manual_seed(2)
    v = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in model.named_parameters()}
    found = woodfisher(model, batches(request.retain, size), pal.tasks.Classification(), v, n)
    tensors = request.retain.tensors
    expected = recursion(model, tensors["input"], tensors["label"], flat(v), n)
    assert torch.allclose(flat(found), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(expected, flat(v), rtol=1e-6, atol=1e-9)


def test_slopes_are_dot_products_with_the_gradients_of_single_records(small):
    model, request = small
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    batch = next(batches(request.forget, 6))
    found = slopes(model, batch, pal.tasks.Classification(), direction)
    single = [
        flat_gradient(model, batch["input"][i : i + 1], batch["label"][i : i + 1]).sum() for i in range(6)
    ]
    assert torch.allclose(found, torch.stack(single), atol=1e-10)


def test_the_step_goes_up_the_forget_loss_and_down_the_retained_loss(small):
    model, request = small
    unlearned = pal.forget(model, request, "influence", pal.tasks.Classification(), alpha=0.5, samples=3)
    forget, retain = request.forget.tensors, request.retain.tensors
    gap = flat_gradient(model, *forget.values()) - flat_gradient(model, *retain.values())
    expected = recursion(model, retain["input"], retain["label"], 6 / 20 * gap, 3)
    before, after = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, unlearned))
    assert torch.allclose(after - before, 0.5 * expected, atol=1e-12)
    with torch.no_grad():
        rise = F.cross_entropy(unlearned(forget["input"]), forget["label"]) - F.cross_entropy(
            model(forget["input"]), forget["label"]
        )
    assert rise > 0


def test_a_step_of_no_length_changes_nothing(digits_model, class_request, digits_task):
    assert same(pal.forget(digits_model, class_request, "influence", digits_task, alpha=0.0), digits_model)


def test_a_class_is_forgotten_and_the_rest_kept(digits_model, class_request, digits_task):
    unlearned = pal.forget(digits_model, class_request, "influence", digits_task)
    assert accuracy(unlearned, class_request.forget) <= 0.2  # measured 0.000
    assert accuracy(unlearned, class_request.retain) >= 0.9  # measured 0.949


def test_part_of_a_class_and_random_records_can_be_forgotten(
    digits, digits_model, random_request, digits_task
):
    part = pal.by_column("label", 3) & pal.by_fraction(0.3, seed=0)
    for request in (pal.split(digits, part, test=0.2, holdout=0.2, seed=0), random_request):
        unlearned = pal.forget(digits_model, request, "influence", digits_task)
        assert accuracy(unlearned, request.forget) < accuracy(digits_model, request.forget) - 0.02
        assert accuracy(unlearned, request.retain) >= 0.9


def test_the_result_is_deterministic_and_the_original_stays(digits_model, class_request, digits_task):
    before = copy.deepcopy(digits_model)
    runs = [
        pal.forget(digits_model, class_request, "influence", digits_task, seed=seed) for seed in (0, 0, 1)
    ]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])  # nothing in it is random
    assert same(digits_model, before)


def test_frozen_parameters_and_batch_norm_statistics_stay(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0, width=4).train()
    model.stem.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    unlearned = pal.forget(model, class_request, "influence", digits_task)
    after = unlearned.state_dict()
    kept = [name for name in before if name.startswith("stem.") or "running" in name or "num_batches" in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("setting", [{"alpha": -1.0}, {"samples": 0}, {"alpha": float("nan")}])
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "influence", digits_task, **setting)


def test_missing_retained_records_and_frozen_models_are_refused(digits_model, class_request, digits_task):
    with pytest.raises(MissingNeed, match="retain-data"):
        pal.forget(digits_model, replace(class_request, retain=None), "influence", digits_task)
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        pal.forget(frozen, class_request, "influence", digits_task)
    with pytest.raises(MissingNeed, match="at least one"):
        woodfisher(digits_model, [], digits_task, {})
