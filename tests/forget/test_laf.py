from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.forget.measuring import accuracy, changed, fingerprint, kept_and_gone, tensors_of
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset, TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    MissingNeed,
    ModelMismatch,
    NonFinite,
    UnknownName,
)
from palimpsest.core.needs import Need
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget.classifier.laf import (
    LAF,
    alignment_loss,
    cosine_distance,
    representation,
    representations,
    squashed_error,
    unlearning_loss,
)
from palimpsest.forget.classifier.laf_r import LAFRepair
from palimpsest.models import build_model

FEW: dict[str, Any] = {"steps": 6, "lr_unlearning": 1e-3, "lr_alignment": 1e-3, "vae_epochs": 1}
PUBLISHED: dict[str, Any] = {"lr_unlearning": 5e-5, "lr_alignment": 1e-4, "temperature": 20.0}
"""On MNIST, to forget a class."""


def laf(model, request, task, name="laf", **settings):
    return pal.forget(model, request, name, task, **settings)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def few(class_request):
    """Part of the request: 40 forget and 100 retained records."""
    return pal.ForgetSplit(class_request.forget.select(range(40)), class_request.retain.select(range(100)))


# The two losses


def test_the_unlearning_loss_is_a_difference_of_sums_of_squashed_squared_errors():
    kept, kept_rebuilt, gone, gone_rebuilt = rows(4, 3, 5)

    def squashed(e, r):
        d = sum((a - b) ** 2 for a, b in zip(e.tolist(), r.tolist(), strict=True))
        return math.exp(d / (d + 1))

    expected = sum(map(squashed, kept, kept_rebuilt)) - sum(map(squashed, gone, gone_rebuilt))
    found = unlearning_loss(kept, kept_rebuilt, gone, gone_rebuilt).item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("distance", "expected"), [(0.0, 1.0), (1.0, math.exp(0.5)), (1e18, math.e)])
def test_a_record_counts_between_1_and_e_however_badly_it_is_rebuilt(distance, expected):
    e = torch.zeros(1, 2, requires_grad=True)
    error = squashed_error(e, torch.tensor([[0.0, distance]]))
    assert error.item() == pytest.approx(expected, rel=1e-6)
    error.backward()
    assert torch.isfinite(e.grad).all()


def test_the_alignment_loss_is_a_ratio_of_exponential_cosine_distances():
    kept, kept_teacher, gone, gone_teacher = rows(4, 3, 5)

    def distance(a, b):
        return 1 - float(a @ b / (a.norm() * b.norm()))

    pushed = sum(math.exp(distance(a, b) / 5) for a, b in zip(gone, gone_teacher, strict=True))
    expected = sum(
        math.log(math.exp(distance(a, b)) / pushed) for a, b in zip(kept, kept_teacher, strict=True)
    )
    found = alignment_loss(kept, kept_teacher, gone, gone_teacher, 5.0).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_descending_the_alignment_pulls_retained_records_back_and_pushes_forget_records_away():
    kept_teacher, gone_teacher = rows(2, 4, 6)
    kept, gone = (kept_teacher + rows(4, 6, seed=1)), (gone_teacher + rows(4, 6, seed=2))
    kept, gone = kept.requires_grad_(), gone.requires_grad_()
    of_kept, of_gone = torch.autograd.grad(
        alignment_loss(kept, kept_teacher, gone, gone_teacher, 5.0), (kept, gone)
    )
    before, after = (cosine_distance(e, kept_teacher) for e in (kept, kept - 0.1 * of_kept))
    assert (after < before).all()
    before, after = (cosine_distance(e, gone_teacher) for e in (gone, gone - 0.1 * of_gone))
    assert (after > before).all()


def test_representations_of_zeros_are_at_distance_1_with_finite_gradients():
    e = torch.zeros(2, 3, requires_grad=True)
    distance = cosine_distance(e, rows(2, 3))
    assert distance.tolist() == [1.0, 1.0]
    distance.sum().backward()
    assert torch.isfinite(e.grad).all()


# What it does to a network


def geometry(model, original, records, task):
    """Mean cosine of representations with those of the original."""
    before, after = (representations(m, records, task, pal.Runtime(device="cpu")) for m in (original, model))
    return float(F.cosine_similarity(before, after).mean())


def test_the_defaults_forget_a_class_and_keep_the_others(digits_model, class_request, digits_task):
    before, _ = kept_and_gone(digits_model, class_request)
    after = laf(digits_model, class_request, digits_task)
    kept, gone = kept_and_gone(after, class_request)
    assert gone <= 0.15 and kept >= before - 0.05 and kept >= 0.92
    towards = [
        geometry(after, digits_model, part, digits_task)
        for part in (class_request.retain, class_request.forget)
    ]
    assert towards[0] >= towards[1] + 0.1


def test_the_defaults_spare_what_random_records_share_with_the_rest(
    digits_model, random_request, digits_task
):
    after = laf(digits_model, random_request, digits_task)
    for part in (random_request.retain, random_request.test):
        assert accuracy(after, part) >= accuracy(digits_model, part) - 0.02
    assert accuracy(after, random_request.forget) <= accuracy(digits_model, random_request.forget) + 0.02


@pytest.mark.slow
def test_a_stronger_push_moves_random_records_more_than_the_others_at_a_price(
    digits_model, random_request, digits_task
):
    after = laf(digits_model, random_request, digits_task, temperature=2.0, lr_alignment=2e-3)
    forget, retain = random_request.forget, random_request.retain
    rise, price = (loss_of(after, part) - loss_of(digits_model, part) for part in (forget, retain))
    assert rise > price > 0
    assert accuracy(after, forget) <= accuracy(after, retain) - 0.05
    moved, kept = (geometry(after, digits_model, part, digits_task) for part in (forget, retain))
    assert kept > moved + 0.02


@torch.no_grad()
def loss_of(model, records):
    tensors = tensors_of(records)
    return float(F.cross_entropy(model(tensors["input"]), tensors["label"]))


def test_published_rates_do_nothing_in_few_steps_and_it_says_so(
    digits_model, class_request, digits_task, caplog
):
    after = laf(digits_model, class_request, digits_task, steps=80, **PUBLISHED)
    assert "too little to forget" in caplog.text and "80 steps" in caplog.text
    for before_, after_ in zip(
        kept_and_gone(digits_model, class_request), kept_and_gone(after, class_request), strict=True
    ):
        assert abs(after_ - before_) <= 0.03  # a record of the class is 0.028
    caplog.clear()
    laf(digits_model, class_request, digits_task, **FEW | {"lr_alignment": 0.02})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("sizes", "epochs", "steps"), [((40, 100), 3, 6), ((40, 20), 3, 3), ((33, 33), 2, 4)]
)
def test_an_epoch_stops_with_the_shorter_set_and_every_pair_takes_two_steps(
    sizes, epochs, steps, digits_model, class_request, digits_task
):
    request = pal.ForgetSplit(
        class_request.forget.select(range(sizes[0])), class_request.retain.select(range(sizes[1]))
    )
    counted = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: counted.append(optimizer.param_groups[0]["lr"])
    )
    try:
        laf(digits_model, request, digits_task, epochs=epochs, lr_unlearning=3e-4, lr_alignment=5e-4)
    finally:
        handle.remove()
    assert [lr for lr in counted if lr != 1e-3] == [3e-4, 5e-4] * steps  # 1e-3 is the autoencoders'


def test_without_one_of_the_losses_only_the_other_steps(digits_model, few, digits_task):
    for off, rate in (("lr_unlearning", 5e-4), ("lr_alignment", 3e-4)):
        counted = []
        handle = register_optimizer_step_pre_hook(
            lambda optimizer, *_, counted=counted: counted.append(optimizer.param_groups[0]["lr"])
        )
        try:
            rates: dict[str, Any] = {"lr_unlearning": 3e-4, "lr_alignment": 5e-4, off: 0.0}
            laf(digits_model, few, digits_task, steps=4, **rates)
        finally:
            handle.remove()
        assert [lr for lr in counted if lr != 1e-3] == [rate] * 4


def test_the_head_does_not_move(digits_model, few, digits_task):
    moved = {
        name: bool(where.any())
        for name, where in changed(digits_model, laf(digits_model, few, digits_task, **FEW)).items()
    }
    assert moved == {name: not name.startswith("head.") for name in moved}


def test_representations_may_be_those_of_any_layer(digits_model, few, digits_task):
    batch = few.forget.batch(range(3), digits_task.collate)
    x = batch["input"]
    pre = digits_model.fc(
        F.max_pool2d(F.relu(digits_model.conv2(F.max_pool2d(F.relu(digits_model.conv1(x)), 2))), 2).flatten(1)
    )
    torch.testing.assert_close(representation(digits_model, batch, digits_task, "fc"), pre)
    torch.testing.assert_close(representation(digits_model, batch, digits_task), pre.relu())
    early = laf(digits_model, few, digits_task, layer="conv1", **FEW)
    moved = {name for name, where in changed(digits_model, early).items() if where.any()}
    assert moved == {"conv1.weight", "conv1.bias"}


# No label is read


class Trap:
    """A label that cannot be looked at."""

    def __getattribute__(self, name):
        raise AssertionError(f"a label was read ({name})")

    def _read(self, *_):
        raise AssertionError("a label was read")

    __index__ = __int__ = __float__ = __array__ = __eq__ = __hash__ = __repr__ = __len__ = __iter__ = _read  # pyright: ignore
    __deepcopy__ = __copy__ = __reduce_ex__ = __bool__ = _read  # pyright: ignore


class Trapped(Dataset):
    """Pictures whose labels raise when they are read."""

    def __init__(self, pictures, named=False):
        self.pictures, self.named = pictures, named

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures[index]
        return {"input": picture, "label": Trap()} if self.named else (picture, Trap())


class LazyItem(dict):
    """An item whose label is made when it is asked for."""

    def __getitem__(self, key):
        if key == "label":
            raise AssertionError("a label was read")
        return super().__getitem__(key)


class Lazy(Trapped):
    def __getitem__(self, index):
        return LazyItem(input=self.pictures[index], label=None)


@pytest.mark.parametrize(("kind", "named"), [(Trapped, False), (Trapped, True), (Lazy, True)])
def test_no_label_of_any_record_is_read(kind, named, digits_model, few, digits_task):
    pictures = {name: tensors_of(part)["input"] for name, part in few.parts.items()}
    trapped = {name: pal.Records(kind(x, named), ids=few.parts[name].ids) for name, x in pictures.items()}
    found = laf(digits_model, pal.ForgetSplit(trapped["forget"], trapped["retain"]), digits_task, **FEW)
    assert fingerprint(found) == fingerprint(laf(digits_model, few, digits_task, **FEW))
    assert fingerprint(found) != fingerprint(digits_model)
    with pytest.raises(AssertionError, match="label was read"):
        _ = int(trapped["forget"][0]["label"])


@pytest.mark.parametrize("labels", ["wrong", "constant", "absent", "garbage"])
def test_labels_make_no_difference(labels, digits_model, few, digits_task):
    def relabelled(records):
        x, y = tensors_of(records).values()
        new = {"wrong": 9 - y, "constant": 0 * y, "garbage": 1000 * y - 7}.get(labels)
        return pal.Records(TensorDataset(x) if new is None else TensorDataset(x, new), ids=records.ids)

    other = pal.ForgetSplit(relabelled(few.forget), relabelled(few.retain))
    found = laf(digits_model, other, digits_task, **FEW)
    assert fingerprint(found) == fingerprint(laf(digits_model, few, digits_task, **FEW))


def test_labels_are_needed_for_the_repair_only():
    without = {Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA}
    assert UNLEARNERS.get("laf").card.needs == without
    assert UNLEARNERS.get("laf-r").card.needs == without | {Need.RETAIN_LABELS}


# The repair


def test_the_repair_moves_the_head_of_what_laf_gives_and_reads_no_forget_label(
    digits_model, few, digits_task
):
    plain = laf(digits_model, few, digits_task, **FEW)
    forget = pal.Records(Trapped(tensors_of(few.forget)["input"]), ids=few.forget.ids)
    repaired = laf(digits_model, replace(few, forget=forget), digits_task, "laf-r", repair_steps=3, **FEW)
    moved = {name for name, where in changed(plain, repaired).items() if where.any()}
    assert moved == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in repaired.parameters())


def test_the_repair_lowers_the_loss_of_retained_records_and_takes_the_steps_it_is_told(
    digits_model, few, digits_task
):
    plain = laf(digits_model, few, digits_task, **FEW)
    counted = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: counted.append(optimizer.param_groups[0]["lr"])
    )
    try:
        settings = {"repair_steps": 20, "repair_lr": 2e-3, "repair_fraction": 0.5}
        repaired = laf(digits_model, few, digits_task, "laf-r", **settings, **FEW)
    finally:
        handle.remove()
    assert counted.count(2e-3) == 20
    assert loss_of(repaired, few.retain) < loss_of(plain, few.retain)


def test_only_a_share_of_the_labels_is_used_if_so_told(digits_model, few, digits_task):
    def spoilt(records, kept):
        x, y = tensors_of(records).values()
        y = torch.where(torch.isin(torch.arange(len(y)), torch.tensor(kept)), y, 9 - y)
        return pal.Records(TensorDataset(x, y), ids=records.ids)

    runtime = pal.Runtime(seed=0)
    used = torch.randperm(100, generator=runtime.generator("laf-r sample"))[:10].tolist()
    settings = FEW | {"repair_fraction": 0.1, "repair_steps": 3}
    one = laf(digits_model, few, digits_task, "laf-r", **settings)
    two = laf(digits_model, replace(few, retain=spoilt(few.retain, used)), digits_task, "laf-r", **settings)
    three = laf(digits_model, replace(few, retain=spoilt(few.retain, [])), digits_task, "laf-r", **settings)
    assert fingerprint(one) == fingerprint(two) != fingerprint(three)


def test_the_repair_without_labels_is_refused_before_any_work(digits_model, few, digits_task):
    bare = replace(
        few, retain=pal.Records(TensorDataset(tensors_of(few.retain)["input"]), ids=few.retain.ids)
    )
    with pytest.raises(MissingNeed, match="retain-labels"):
        laf(digits_model, bare, digits_task, "laf-r", **FEW)
    with pytest.raises(MissingNeed, match="'laf' needs no labels"):
        LAFRepair(**FEW).unlearn(digits_model, bare, digits_task, pal.Runtime())
    with pytest.raises(InvalidLabels, match="0 to 9"):
        laf(build_model("mlp", (1, 8, 8), 4), few, digits_task, "laf-r", **FEW)
    headless = copy.deepcopy(digits_model)
    headless.head.requires_grad_(False)
    with pytest.raises(ModelMismatch, match="head"):
        laf(headless, few, digits_task, "laf-r", **FEW)


# What it leaves alone


def test_the_same_seed_gives_the_same_bytes_and_the_model_given_stays(digits_model, few, digits_task):
    before = fingerprint(digits_model)
    found = [fingerprint(laf(digits_model, few, digits_task, seed=seed, **FEW)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert fingerprint(digits_model) == before


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["laf", "laf-r"])
def test_large_vision_models_take_a_step_with_batch_norm_at_rest(name, method, digits_task):
    settings = {"img_size": 32} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 4, seed=0, **settings).train()
    head = "head" if name.startswith("timm") else "fc"
    data = TensorDataset(
        torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    )
    request = pal.split(pal.Records(data), pal.by_column("label", 3), test=0.0, holdout=0.0)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    repair = {"repair_steps": 1} if method == "laf-r" else {}
    after = laf(model, request, digits_task, method, steps=1, vae_epochs=1, **repair)
    assert all(torch.equal(dict(model.named_buffers())[key], value) for key, value in after.named_buffers())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(next(iter(after.parameters())), frozen)
    assert model.training and not any(module.training for module in after.modules())
    assert [p.requires_grad for p in after.parameters()] == [p.requires_grad for p in model.parameters()]
    moved = {key for key, where in changed(model, after).items() if where.any()}
    assert any(key.startswith(f"{head}.") for key in moved) == (method == "laf-r")
    assert len(moved) > 20
    width = representations(model, request.forget, digits_task, pal.Runtime(device="cpu")).shape[1]
    assert width == (192 if name.startswith("timm") else 512)


# Bad input


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"lr_unlearning": -1e-3}, "lr_unlearning"),
        ({"lr_alignment": float("inf")}, "lr_alignment"),
        ({"lr_unlearning": 0.0, "lr_alignment": 0.0}, "nothing would move"),
        ({"steps": 0}, "steps"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"latent": 0}, "latent"),
        ({"vae_epochs": 0}, "vae_epochs"),
        ({"vae_lr": 0.0}, "vae_lr"),
        ({"decoder": "tanh"}, "tanh"),
    ],
)
def test_settings_out_of_range_are_refused(setting, named, digits_model, few, digits_task):
    with pytest.raises(InvalidHyperparameter, match=named):
        laf(digits_model, few, digits_task, **setting)


@pytest.mark.parametrize(
    "setting", [{"repair_steps": 0}, {"repair_lr": 0.0}, {"repair_fraction": 0.0}, {"latent": 0}]
)
def test_settings_of_the_repair_out_of_range_are_refused(setting, digits_model, few, digits_task):
    with pytest.raises(InvalidHyperparameter, match=next(iter(setting))):
        laf(digits_model, few, digits_task, "laf-r", **setting)


def test_retained_records_a_representation_and_something_that_feeds_it_are_needed(
    digits_model, few, digits_task
):
    with pytest.raises(MissingNeed, match="retain-data"):
        laf(digits_model, replace(few, retain=None), digits_task)
    with pytest.raises(MissingNeed, match="labels are not needed"):
        LAF().unlearn(digits_model, replace(few, retain=None), digits_task, pal.Runtime())
    with pytest.raises(UnknownName, match="Did you mean 'fc'"):
        laf(digits_model, few, digits_task, layer="fc1")
    with pytest.raises(ModelMismatch, match="trainable"):
        laf(copy.deepcopy(digits_model).requires_grad_(False), few, digits_task)
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    frozen.head.requires_grad_()
    with pytest.raises(ModelMismatch, match="feeds the representation"):
        laf(frozen, few, digits_task)


def test_representations_of_zeros_alone_or_of_nan_are_refused(digits_model, few, digits_task):
    dead = copy.deepcopy(digits_model)
    with torch.no_grad():
        dead.fc.weight.zero_()
        dead.fc.bias.fill_(-1.0)
    with pytest.raises(ModelMismatch, match="zero"):
        laf(dead, few, digits_task)

    class Odd(nn.Module):
        """A layer whose NaN the head does not see."""

        def __init__(self):
            super().__init__()
            self.side, self.head = nn.Linear(64, 4), nn.Linear(64, 10)

        def forward(self, x):
            self.side(x.flatten(1) * torch.nan)
            return self.head(x.flatten(1))

    with pytest.raises(NonFinite, match="NaN"):
        laf(Odd(), few, digits_task, layer="side")
