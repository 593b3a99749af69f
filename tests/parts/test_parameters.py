import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from palimpsest.core.errors import ModelMismatch, UnknownName
from palimpsest.models import build_model
from palimpsest.parts.parameters import (
    check_mask,
    masked_updates,
    matching,
    only_trainable,
    snapshot,
    trainable,
    unwrapped,
)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_a_tied_parameter_is_listed_once():
    assert list(trainable(tied())) == ["0.weight", "0.bias", "1.bias"]


def test_wrappers_leave_no_prefix():
    model = nn.Linear(2, 2)
    assert list(trainable(nn.DataParallel(model))) == ["weight", "bias"]
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model  # pyright: ignore


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ModelMismatch, match="no trainable parameters"):
        trainable(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ModelMismatch, match="no trainable parameters"):
        trainable(nn.ReLU())


def test_a_snapshot_does_not_follow_the_model():
    model = nn.Linear(2, 2)
    taken = snapshot(model)
    with torch.no_grad():
        model.weight += 1
    torch.testing.assert_close(model.weight.detach(), taken["weight"] + 1)


def test_patterns_match_parameters_layers_and_wildcards():
    model = build_model("small_cnn", (1, 8, 8), 10, seed=0)
    assert list(matching(model, "fc.weight")) == ["fc.weight"]
    assert list(matching(model, "fc")) == ["fc.weight", "fc.bias"]
    assert list(matching(model, "conv*")) == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    assert list(matching(model, "head", "*.bias")) == [
        "conv1.bias",
        "conv2.bias",
        "fc.bias",
        "head.weight",
        "head.bias",
    ]


def test_a_layer_does_not_match_another_that_begins_alike():
    model = nn.ModuleDict({"block1": nn.Linear(1, 1), "block10": nn.Linear(1, 1)})
    assert list(matching(model, "block1")) == ["block1.weight", "block1.bias"]


def test_a_tied_parameter_answers_to_both_names():
    assert list(matching(tied(), "1")) == ["0.weight", "1.bias"]


def test_a_pattern_that_nothing_fits_is_refused_with_the_nearest_name():
    model = build_model("small_cnn", (1, 8, 8), 10, seed=0)
    with pytest.raises(UnknownName, match="Did you mean 'head'"):
        matching(model, "conv1", "haed")


def test_freezing_is_undone_even_after_an_error():
    model = build_model("small_cnn", (1, 8, 8), 10, seed=0)
    model.get_parameter("conv1.bias").requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError), only_trainable(model, ["head.weight", "conv1.bias"]) as moving:
        assert list(moving) == ["conv1.bias", "head.weight"]
        assert [name for name, p in model.named_parameters() if p.requires_grad] == list(moving)
        raise RuntimeError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with pytest.raises(UnknownName, match="head"), only_trainable(model, ["heads.weight"]):
        pass


def optimizers(model):
    return {
        "sgd": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
        "nesterov": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        "adam": torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.1),
        "adamw": torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1),
    }


def descend(model, optimizer, x, times=5):
    for _ in range(times):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw"])
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_only_entries_inside_the_mask_move(name, seed, share):
    random = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 2)
    before = snapshot(model)
    mask = {key: torch.rand(value.shape, generator=random) < share for key, value in before.items()}
    optimizer = optimizers(model)[name]
    with masked_updates(model, optimizer, mask):
        descend(model, optimizer, torch.randn(4, 3, generator=random))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.detach() != before[key], mask[key])
        state = optimizer.state[parameter]
        for entry in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            if entry in state:
                assert (state[entry][~mask[key]] == 0).all()


def test_momentum_from_before_does_not_leak_through_the_mask():
    model = nn.Linear(3, 2)
    optimizer = optimizers(model)["sgd"]
    x = torch.randn(4, 3)
    descend(model, optimizer, x)
    before = snapshot(model)
    nothing = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in before.items()}
    with masked_updates(model, optimizer, nothing):
        descend(model, optimizer, x)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_a_full_mask_changes_nothing_about_training():
    x = torch.randn(4, 3)
    models = []
    for masked in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = optimizers(model)["adam"]
        if masked:
            everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
            with masked_updates(model, optimizer, everything):
                descend(model, optimizer, x)
        else:
            descend(model, optimizer, x)
        models.append(model)
    assert torch.equal(models[0].weight, models[1].weight)


def test_after_the_context_everything_moves_again():
    model = nn.Linear(3, 2)
    optimizer = optimizers(model)["sgd"]
    nothing = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    with masked_updates(model, optimizer, nothing):
        pass
    before = snapshot(model)
    descend(model, optimizer, torch.randn(4, 3), times=1)
    assert all((value != before[name]).all() for name, value in snapshot(model).items())


def test_a_mask_that_does_not_fit_is_refused():
    model = nn.Linear(3, 2)
    mask = {"weight": torch.ones(2, 3, dtype=torch.bool), "bias": torch.ones(2, dtype=torch.bool)}
    check_mask(mask, model)
    with pytest.raises(ModelMismatch, match="names of 1 parameters: 'bias'"):
        check_mask({"weight": mask["weight"]}, model)
    with pytest.raises(ModelMismatch, match="'other'"):
        check_mask({**mask, "other": mask["bias"]}, model)
    with pytest.raises(ModelMismatch, match="shape"):
        check_mask({**mask, "bias": torch.ones(3, dtype=torch.bool)}, model)
    with pytest.raises(ModelMismatch, match="boolean"):
        check_mask({**mask, "bias": torch.ones(2)}, model)
