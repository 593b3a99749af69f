from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import InvalidAudit, MissingNeed, ModelMismatch, PalimpsestError, UnknownName
from palimpsest.core.evidence import Evidence, observe_all
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need, parse_needs, require
from palimpsest.core.registry import Registry
from palimpsest.core.unlearner import UNLEARNERS, build


def test_each_model_sees_each_part_once_however_often_audits_ask(
    digits_model, class_request, digits_task, class_controls
):
    runtime = pal.Runtime()
    evidence = Evidence(
        class_controls[0], class_request, digits_task, runtime, digits_model, class_controls[1:]
    )
    for _ in range(3):
        for role in evidence.roles:
            for part in class_request.parts:
                evidence.observe(role, part)
    assert evidence.roles == ["original", "unlearned", "control 0", "control 1"]
    assert len(runtime.passes) == 16 and set(runtime.passes.values()) == {1}


def test_an_observation_is_what_the_model_says_row_by_row(digits_model, class_request, digits_task):
    seen = observe_all(digits_model, class_request.test, digits_task, pal.Runtime(batch_size=50))
    data = class_request.test.tensors
    with torch.no_grad():
        hidden: dict = {}
        handle = digits_model.head.register_forward_pre_hook(lambda m, i: hidden.update(x=i[0]))
        logits = digits_model(data["input"])
        handle.remove()
    assert torch.allclose(seen.logits, logits, atol=1e-5)
    assert torch.allclose(seen.features, hidden["x"], atol=1e-5)
    assert torch.allclose(
        seen.loss, nn.functional.cross_entropy(logits, data["label"], reduction="none"), atol=1e-5
    )
    assert list(seen.layers) == ["conv1", "conv2", "fc", "head"]
    assert torch.allclose(seen.layers["head"], logits, atol=1e-5)


def test_observing_leaves_mode_weights_and_hooks_as_they_were(digits_model, class_request, digits_task):
    model = copy.deepcopy(digits_model)
    model.train()
    model.conv1.eval()
    before = copy.deepcopy(model.state_dict())
    observe_all(model, class_request.forget, digits_task, pal.Runtime())
    assert model.training and not model.conv1.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.conv2.modules())


def test_a_part_larger_than_the_limit_is_sampled_and_always_alike(digits_model, class_request, digits_task):
    picks = [
        Evidence(digits_model, class_request, digits_task, pal.Runtime(seed=3), limit=50)
        .records("retain")
        .ids
        for _ in range(2)
    ]
    assert len(picks[0]) == 50 and picks[0] == picks[1]


def test_an_absent_part_or_role_is_named(digits_model, class_request, digits_task):
    bare = pal.ForgetSplit(class_request.forget, class_request.retain)
    evidence = Evidence(digits_model, bare, digits_task)
    with pytest.raises(InvalidAudit, match="no holdout part"):
        evidence.observe("unlearned", "holdout")
    with pytest.raises(InvalidAudit, match="'original'"):
        evidence.observe("original", "forget")


def test_a_model_that_gives_nan_is_refused(class_request, digits_task):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * float("nan")

    with pytest.raises(ModelMismatch, match="NaN"):
        Evidence(Broken(), class_request, digits_task).observe("unlearned", "forget")


def test_modes_come_back_even_after_an_error(digits_model):
    model = copy.deepcopy(digits_model).train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training and all(module.training for module in model.modules())


def test_streams_of_random_numbers_are_independent_of_each_other_and_repeat():
    runtime = pal.Runtime(seed=5)
    one, again = (
        torch.rand(4, generator=runtime.generator("a")),
        torch.rand(4, generator=runtime.generator("a")),
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, torch.rand(4, generator=runtime.generator("b")))
    assert not torch.equal(one, torch.rand(4, generator=runtime.with_seed(6).generator("a")))
    before = torch.get_rng_state()
    with runtime.seeded("x"):
        torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())


def test_records_of_similar_length_share_a_batch_and_all_come_once(class_request, digits_task):
    part, runtime = class_request.retain, pal.Runtime()
    lengths = np.random.default_rng(0).integers(1, 90, len(part))
    where = {str(name): at for at, name in enumerate(part.ids)}

    def spreads(**how):
        batches = list(runtime.batches(part, digits_task, 16, torch.Generator().manual_seed(0), **how))
        assert sorted(name for batch in batches for name in batch["id"]) == sorted(where)
        rows = [lengths[[where[name] for name in batch["id"]]] for batch in batches]
        return np.array([row.max() - row.min() for row in rows]), [int(row.min()) for row in rows]

    alike, order = spreads(lengths=lengths.tolist())
    assert alike.mean() < spreads()[0].mean() / 5
    assert order != sorted(order)


def test_batches_cover_every_record_once_in_the_generators_order(class_request, digits_task):
    runtime = pal.Runtime()
    order = runtime.generator("order")
    ids = [
        i
        for batch in runtime.batches(class_request.test, digits_task, 32, shuffle=order)
        for i in batch["id"]
    ]
    assert sorted(ids) == sorted(class_request.test.ids) and ids != class_request.test.ids
    full = list(runtime.batches(class_request.test, digits_task, 32, drop_last=True))
    assert {len(batch["id"]) for batch in full} == {32}


def test_a_missing_need_is_named_with_what_to_do():
    with pytest.raises(MissingNeed, match=r"retain-data.*ForgetSplit\.retain"):
        require("x", {Need.MODEL, Need.RETAIN_DATA}, {Need.MODEL})
    assert parse_needs(["model", "forget-data"]) == {Need.MODEL, Need.FORGET_DATA}
    with pytest.raises(UnknownName, match="Did you mean 'forget-data'"):
        parse_needs(["forget-dta"])


def test_forgetting_without_retained_data_says_so_before_any_work(digits_model, class_request, digits_task):
    bare = pal.ForgetSplit(class_request.forget)
    with pytest.raises(MissingNeed, match="'ssd' cannot run, it needs retain-data"):
        pal.forget(digits_model, bare, "ssd", digits_task)


def test_unknown_methods_and_hyperparameters_suggest_the_nearest(digits_model, class_request, digits_task):
    with pytest.raises(UnknownName, match="Did you mean 'ssd'"):
        pal.forget(digits_model, class_request, "sdd", digits_task)
    with pytest.raises(UnknownName, match="Did you mean 'alpha'"):
        build("method", UNLEARNERS.get("ssd"), "ssd", {"alfa": 3})


def test_a_name_is_taken_only_once():
    registry: Registry[object] = Registry("thing", "palimpsest.core")
    registry.register("a")(int)
    registry.register("a")(int)
    with pytest.raises(PalimpsestError, match="is taken"):
        registry.register("a")(str)


def test_seeds_make_training_and_forgetting_repeat_bit_for_bit(digits, digits_task):
    parts = pal.split(digits.select(np.arange(300)), pal.by_column("label", 1))
    from palimpsest.models import build_model

    def run(seed):
        model = pal.train(
            build_model("mlp", (1, 8, 8), 10, seed=seed), parts.train, digits_task, epochs=1, seed=seed
        )
        return [
            *model.state_dict().values(),
            *pal.forget(model, parts, "retrain", digits_task, seed=seed).state_dict().values(),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(run(0), run(1), strict=True))
