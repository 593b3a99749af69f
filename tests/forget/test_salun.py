import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.forget.measuring import changed, fingerprint, kept_and_gone

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch
from palimpsest.core.runtime import Runtime
from palimpsest.forget.classifier.salun import saliency_mask, shrink
from palimpsest.models import build_model
from palimpsest.parts.parameters import snapshot


def salun(model, request, task, **settings):
    return pal.forget(model, request, "salun", task, seed=0, **settings)


def mask_of(model, request, task, ratio, batch_size=64):
    return saliency_mask(model, Runtime().batches(request.forget, task, batch_size), task, ratio)


def everything(mask):
    return torch.cat([chosen.flatten() for chosen in mask.values()])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_exactly_the_masked_weights_move(ratio, digits_model, class_request, digits_task):
    mask = mask_of(digits_model, class_request, digits_task, ratio)
    moved = changed(digits_model, salun(digits_model, class_request, digits_task, ratio=ratio, epochs=2))
    assert int(everything(mask).sum()) == int(ratio * len(everything(mask)))
    for name, chosen in mask.items():
        assert not (moved[name] & ~chosen).any(), name
    assert (everything(moved) & everything(mask)).sum() >= 0.99 * everything(mask).sum()


def test_adam_keeps_the_others_too(digits_model, class_request, digits_task):
    mask = mask_of(digits_model, class_request, digits_task, 0.5)
    settings = {"optimizer": "adam", "lr": 1e-3, "epochs": 2, "weight_decay": 0.1}
    moved = changed(digits_model, salun(digits_model, class_request, digits_task, **settings))
    assert not any((moved[name] & ~chosen).any() for name, chosen in mask.items())


@pytest.mark.parametrize("label", [0, 3, 7])
@pytest.mark.parametrize("settings", [{}, {"order": "mixed"}, {"soft": True}], ids=str)
def test_the_class_is_forgotten_and_the_rest_kept(label, settings, digits, digits_model, digits_task):
    """Measured: nothing of the class is left, 0.97 of the rest."""
    request = pal.split(digits, pal.by_column("label", label), test=0.2, holdout=0.2, seed=0)
    kept, gone = kept_and_gone(salun(digits_model, request, digits_task, **settings), request)
    assert gone <= 0.3 and kept >= 0.93


def test_the_mask_holds_the_largest_gradients_over_all_parameters(digits_model, class_request, digits_task):
    total = {name: torch.zeros_like(p) for name, p in digits_model.named_parameters()}
    tensors = class_request.forget.tensors
    for x, y in zip(tensors["input"].split(64), tensors["label"].split(64), strict=True):
        digits_model.zero_grad()
        torch.nn.functional.cross_entropy(digits_model(x), y).backward()
        for name, parameter in digits_model.named_parameters():
            total[name] += parameter.grad
    digits_model.zero_grad()
    mask = mask_of(digits_model, class_request, digits_task, 0.3)
    saliency = torch.cat([value.abs().flatten() for value in total.values()])
    chosen = everything(mask)
    assert saliency[chosen].min() >= saliency[~chosen].max()


def test_a_larger_ratio_only_adds_weights(digits_model, class_request, digits_task):
    small, large, full = (
        everything(mask_of(digits_model, class_request, digits_task, ratio)) for ratio in (0.2, 0.6, 1.0)
    )
    assert not (small & ~large).any() and full.all()


def test_ties_are_broken_by_order_of_definition():
    model = torch.nn.Linear(3, 2)
    batch = {"input": torch.zeros(2, 3), "label": torch.tensor([0, 1]), "id": ["a", "b"]}
    mask = saliency_mask(model, [batch], pal.tasks.Classification(), 0.5)
    assert mask["bias"].sum() + mask["weight"].sum() == 4
    zero_gradient = mask["weight"].flatten()
    assert zero_gradient.tolist() == sorted(zero_gradient.tolist(), reverse=True)


def test_measuring_the_mask_leaves_the_model_alone(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0).train()
    before = fingerprint(model)
    mask_of(model, class_request, digits_task, 0.5)
    assert fingerprint(model) == before and model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_given_mask_is_used(digits_model, class_request, digits_task):
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in digits_model.named_parameters()}
    mask["head.weight"][:] = True
    moved = changed(digits_model, salun(digits_model, class_request, digits_task, mask=mask, epochs=1))
    assert [name for name, entries in moved.items() if entries.any()] == ["head.weight"]
    measured = mask_of(digits_model, class_request, digits_task, 0.5)
    given_one, own = (
        salun(digits_model, class_request, digits_task, epochs=1, **settings)
        for settings in ({"mask": measured}, {"ratio": 0.5})
    )
    assert fingerprint(given_one) == fingerprint(own)


def test_masks_that_do_not_fit_or_move_nothing_are_refused(digits_model, class_request, digits_task):
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in digits_model.named_parameters()}
    with pytest.raises(InvalidHyperparameter, match="empty"):
        salun(digits_model, class_request, digits_task, mask=mask)
    with pytest.raises(ModelMismatch, match=r"fc\.bias"):
        lacking = {name: chosen for name, chosen in mask.items() if name != "fc.bias"}
        salun(digits_model, class_request, digits_task, mask=lacking)
    with pytest.raises(ModelMismatch, match="shape"):
        wrong = {**mask, "fc.bias": torch.ones(3, dtype=torch.bool)}
        salun(digits_model, class_request, digits_task, mask=wrong)
    with pytest.raises(InvalidHyperparameter, match="empty"):
        salun(digits_model, class_request, digits_task, ratio=1e-9)


def test_a_mask_of_no_batches_is_refused(digits_model, digits_task):
    with pytest.raises(InvalidRecords, match="at least one forget record"):
        saliency_mask(digits_model, [], digits_task, 0.5)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_ratios_out_of_range_are_refused(ratio, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match="ratio"):
        salun(digits_model, class_request, digits_task, ratio=ratio)


def test_the_soft_variant_takes_no_mask(digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match="soft"):
        salun(digits_model, class_request, digits_task, soft=True, mask={})


@given(
    change=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40).map(torch.tensor),
    share=st.floats(0, 1),
)
def test_shrinking_moves_every_change_towards_zero_by_one_threshold(change, share):
    found = shrink(change, share)
    count = int(share * len(change))
    assert int((found == 0).sum()) >= count
    threshold = 0.0 if count == 0 else float(change.abs().sort().values[count - 1])
    expected = [max(abs(c) - threshold, 0) * (1 if c > 0 else -1) for c in change.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_soft_variant_stays_closer_to_the_original(digits_model, class_request, digits_task):
    start = snapshot(digits_model)

    def distance(**settings):
        after = snapshot(salun(digits_model, class_request, digits_task, epochs=3, **settings))
        return sum(float((after[name] - start[name]).square().sum()) for name in start)

    assert distance(soft=True, ratio=0.1) < distance(soft=True, ratio=0.5) < distance(ratio=1.0)


def test_the_soft_variant_holds_a_share_of_weights_after_the_first_step(digits, digits_model, digits_task):
    request = pal.split(digits.select(range(80)), pal.by_column("label", 3), test=0, holdout=0)
    settings = {"epochs": 1, "batch_size": 1000, "order": "mixed", "ratio": 0.25}
    moved = everything(
        changed(digits_model, salun(digits_model, request, digits_task, soft=True, **settings))
    )
    assert 0 < moved.float().mean() <= 0.2501
