"""Unwrapping: filters, guards, hooks and adapters around an untouched network hide nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from palimpsest.audit.attacks.bare import ADAPTED, attack_copy, bare_network, complete_places
from palimpsest.audit.attacks.unwrapping import Unwrapping, kept
from palimpsest.core.finding import Judgement
from palimpsest.models import build_model
from tests.audit import planted

LABEL = 3
AUDIT = Unwrapping()


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, not merged."""

    def __init__(self, layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.base_layer = layer
        self.lora_a = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def adapted(model: nn.Module, evidence) -> nn.Module:
    """The network with an adapter before the head, trained to forget while the base stays frozen."""
    wrapped = copy.deepcopy(model)
    wrapped.requires_grad_(False)
    torch.manual_seed(0)
    wrapped.fc = Adapter(wrapped.fc)
    adapter = [*wrapped.fc.lora_a.parameters(), *wrapped.fc.lora_b.parameters()]
    optimizer = torch.optim.Adam(adapter, 1e-2)
    forget = next(evidence.runtime.batches(evidence.records("forget"), evidence.task, 512))
    for _ in range(30):
        optimizer.zero_grad()
        (-evidence.task.loss_per_example(wrapped, forget).mean()).backward()
        optimizer.step()
    return wrapped.eval()


def attribute_masked(model: nn.Module, label: int) -> nn.Module:
    masked = copy.deepcopy(model)
    network_forward = type(model).forward
    masked.forward = lambda x: network_forward(masked, x).index_fill(1, torch.tensor([label]), -1e6)
    return masked


@pytest.mark.parametrize(
    "plant",
    [
        planted.MaskedOutput,
        planted.OutputFilter,
        planted.InputGuard,
        planted.hooked,
        attribute_masked,
        lambda model, label: planted.OutputFilter(planted.MaskedOutput(model, label), label),
    ],
    ids=["mask", "output filter", "input guard", "hook", "replaced forward", "wrapper in a wrapper"],
)
def test_around_an_untouched_network_k_is_exactly_one(judge, read, digits_model, plant):
    outcome = judge(AUDIT, plant(digits_model, LABEL))
    inner = read(outcome, "inner_forget_accuracy")
    assert inner.k == 1.0 and inner.bears == "inside"
    assert read(outcome, "weights_kept").value == 1.0 and read(outcome, "tensors_kept").value == 1.0


def test_an_unmerged_adapter_around_an_untouched_network_has_k_of_one(
    judge, read, class_evidence, digits_model
):
    model = adapted(digits_model, class_evidence)
    evidence = class_evidence.judging(model)
    right = evidence.observe("unlearned", "forget").logits.argmax(1).numpy() == evidence.labels("forget")
    assert right.mean() < 0.1
    outcome = judge(AUDIT, model)
    assert read(outcome, "inner_forget_accuracy").k == 1.0
    assert read(outcome, "inner_forget_accuracy_gain").value > 0.8
    assert read(outcome, "weights_kept").value == 1.0


def test_a_retrained_model_has_no_more_inside_than_outside(judge, read, class_controls):
    outcome = judge(AUDIT, class_controls[2])
    inner = read(outcome, "inner_forget_accuracy")
    assert inner.value <= 0.05 and inner.bears == ""
    assert read(outcome, "weights_kept").value < 0.01


def test_a_wrapped_retrained_model_has_k_of_nothing(judge, read, class_controls):
    inner = read(judge(AUDIT, planted.OutputFilter(class_controls[2], LABEL)), "inner_forget_accuracy")
    assert abs(inner.k) < 0.1


def test_the_share_of_kept_weights_counts_single_numbers(judge, read, digits_model):
    outcome = judge(AUDIT, planted.head_masked(digits_model, LABEL))
    count = sum(parameter.numel() for parameter in digits_model.parameters())
    assert read(outcome, "weights_kept").value == pytest.approx(1 - 1 / count)
    assert read(outcome, "tensors_kept").value == pytest.approx(7 / 8)


def test_shares_against_a_hand_count():
    reference = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0, 4.0]])}
    assert kept({"a": torch.tensor([1.0, 0.0]), "b": reference["b"]}, reference) == 0.75


def test_of_two_networks_inside_the_one_nearest_to_the_original_counts(digits_model, class_controls):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = copy.deepcopy(class_controls[0])
            self.teacher = copy.deepcopy(digits_model)

    model = Both()
    assert set(complete_places(model, digits_model)) == {"student", "teacher"}
    assert bare_network(model, digits_model).place == "teacher"


def test_an_adapted_network_is_found_but_not_taken_for_the_whole(class_evidence, digits_model):
    model = copy.deepcopy(digits_model)
    model.fc = Adapter(model.fc)
    found = bare_network(model, digits_model)
    assert found.place == ADAPTED and not found.complete
    attacked = attack_copy(class_evidence.judging(model), "unlearned")
    assert isinstance(attacked.fc, Adapter)


def test_an_attack_leaves_the_wrapper_out(class_evidence, digits_model):
    model = planted.OutputFilter(digits_model, LABEL)
    attacked = attack_copy(class_evidence.judging(model), "unlearned")
    assert type(attacked) is type(digits_model)
    assert all(parameter.requires_grad for parameter in attacked.parameters())
    assert attacked.fc.weight is not model.inner.fc.weight


def test_a_model_without_parameters_is_not_run_and_says_so(judge, read):
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 10)

    finding = read(judge(AUDIT, Constant()), "inner_forget_accuracy")
    assert finding.judgement == Judgement.NOT_RUN and "no parameters" in finding.note


def test_another_architecture_is_not_run_and_says_so(judge, read):
    finding = read(judge(AUDIT, build_model("mlp", (1, 8, 8), 10)), "inner_forget_accuracy")
    assert finding.judgement == Judgement.NOT_RUN and "names and shapes" in finding.note


def test_models_are_left_as_they_were(judge, digits_model, class_controls, unchanged):
    fingerprint, check = unchanged
    wrapped = planted.OutputFilter(digits_model, LABEL)
    before = [fingerprint(model) for model in (digits_model, wrapped, class_controls[0])]
    judge(AUDIT, wrapped)
    for model, state in zip((digits_model, wrapped, class_controls[0]), before, strict=True):
        check(model, state)
