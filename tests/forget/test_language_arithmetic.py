from __future__ import annotations

import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.forget.language.arithmetic import negate_task_vector
from palimpsest.forget.language.muse_losses import kl_on_logits, npo_on_logits


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)

    def state():
        return {
            "weight": torch.randn(3, 4, generator=generator),
            "norm.weight": torch.randn(3, generator=generator).bfloat16(),
            "steps": torch.randint(10, (2,), generator=generator),
            "mask": torch.rand(2, generator=generator) > 0.5,
        }

    return state(), state(), state()


def test_scale_zero_reproduces_the_target_and_one_undoes_the_fine_tuning(states):
    target, reinforced, _ = states
    assert all(torch.equal(v, target[k]) for k, v in negate_task_vector(target, reinforced, scale=0).items())
    mirrored = negate_task_vector(target, reinforced)
    torch.testing.assert_close(mirrored["weight"] + reinforced["weight"], 2 * target["weight"])


def test_the_vector_is_that_of_the_base_and_integers_are_the_targets(states):
    target, reinforced, base = states
    found = negate_task_vector(target, reinforced, base, 2.5)
    expected = target["weight"] - 2.5 * (reinforced["weight"] - base["weight"])
    torch.testing.assert_close(found["weight"], expected)
    assert torch.equal(found["steps"], target["steps"]) and torch.equal(found["mask"], target["mask"])
    assert list(found) == list(target)


def test_half_precision_is_computed_in_single_and_kept(states):
    target, reinforced, base = states
    found = negate_task_vector(target, reinforced, base, 0.3)["norm.weight"]
    t, r, b = (state["norm.weight"].float() for state in states)
    assert found.dtype == torch.bfloat16 and torch.equal(found, (t - 0.3 * (r - b)).bfloat16())


def test_the_inputs_stay_and_share_nothing_with_the_result(states):
    target, reinforced, _ = states
    before = {name: value.clone() for name, value in target.items()}
    for scale in (0.0, 1.0):
        found = negate_task_vector(target, reinforced, scale=scale)
        for value in found.values():
            value.zero_()
    assert all(torch.equal(before[name], value) for name, value in target.items())


def test_a_model_takes_the_result():
    target, reinforced = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    reinforced(torch.randn(8, 3))
    found = negate_task_vector(target.state_dict(), reinforced.state_dict())
    target.load_state_dict(found)
    assert target.num_batches_tracked == 0


def test_other_names_other_shapes_and_a_zero_vector_are_refused(states):
    target, reinforced, base = states
    with pytest.raises(ModelMismatch, match="'steps'"):
        negate_task_vector(target, {k: v for k, v in reinforced.items() if k != "steps"})
    with pytest.raises(ModelMismatch, match=r"\(4, 3\)"):
        negate_task_vector(target, reinforced, {**base, "weight": base["weight"].T})
    with pytest.raises(ModelMismatch, match="zero"):
        negate_task_vector(
            target, {**reinforced, "weight": target["weight"], "norm.weight": target["norm.weight"]}
        )
    with pytest.raises(InvalidHyperparameter, match="scale"):
        negate_task_vector(target, reinforced, scale=-1)


def test_muses_own_losses_work_on_logits_and_need_one_vocabulary():
    logits, reference = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3, 4)
    sigmoid = 1 / (1 + torch.tensor(-0.5).exp())
    assert npo_on_logits(logits, reference, 0.5).item() == pytest.approx(-4 * sigmoid.log().item())
    assert kl_on_logits(logits, reference).item() == pytest.approx(torch.e * 24 / 2, rel=1e-6)
    for loss in (npo_on_logits, kl_on_logits):
        with pytest.raises(ModelMismatch):
            loss(logits, torch.ones(2, 3, 5))
