from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.audit.cost import Cost, share_changed
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.models import build_model
from tests.audit import planted


def measured(model, class_request, digits_task, **known):
    outcome = Cost().run(Evidence(model, class_request, digits_task, pal.Runtime(), **known))
    return {finding.name: finding for finding in outcome.findings}, outcome.series["cost"]


def test_time_and_memory_are_what_was_measured(class_request, digits_task, digits_model):
    found, rows = measured(
        digits_model,
        class_request,
        digits_task,
        seconds={"unlearned": 3.0, "retrained": 12.0},
        peak_bytes=5 * 2**20,
    )
    assert {name: found[name].value for name in ("seconds", "share", "peak_mb")} == {
        "seconds": 3.0,
        "share": 0.25,
        "peak_mb": 5.0,
    }
    assert list(rows) == [
        {"what": "seconds", "value": 3.0},
        {"what": "share", "value": 0.25},
        {"what": "peak_mb", "value": 5.0},
    ]


@pytest.mark.parametrize(
    "seconds", [{}, {"retrained": 12.0}, {"unlearned": 1.0}, {"unlearned": 1.0, "retrained": 0.0}]
)
def test_what_was_not_measured_is_not_run_and_no_zero(class_request, digits_task, digits_model, seconds):
    found, rows = measured(digits_model, class_request, digits_task, seconds=seconds)
    for name in ("share", "peak_mb"):
        assert found[name].value is None and found[name].judgement == Judgement.NOT_RUN
    assert (found["seconds"].value is None) == ("unlearned" not in seconds)
    assert {row["what"] for row in rows} == ({"seconds"} if "unlearned" in seconds else set())


def test_the_share_of_weights_is_counted_one_by_one(class_request, digits_task, digits_model):
    model = copy.deepcopy(digits_model)
    with torch.no_grad():
        model.conv2.weight.view(-1)[:25] += 1
        model.head.bias[3] = -1000
    total = sum(parameter.numel() for parameter in model.parameters())
    found, _ = measured(model, class_request, digits_task, original=digits_model)
    assert found["weights_changed"].value == pytest.approx(26 / total) and found["weights_changed"].n == total
    untouched, _ = measured(digits_model, class_request, digits_task, original=digits_model)
    assert untouched["weights_changed"].value == 0


def test_a_wrapper_does_not_hide_the_weights(digits_model):
    assert share_changed(digits_model, planted.MaskedOutput(digits_model, 3))[0] == 0
    assert share_changed(planted.MaskedOutput(digits_model, 3), digits_model)[0] == 0
    broken = planted.OutputFilter(planted.noisy(digits_model, 0.1), 3)
    assert share_changed(digits_model, broken)[0] > 0.99
    added = nn.Sequential(digits_model, nn.Linear(10, 10))
    assert share_changed(digits_model, added)[0] == 0


def test_a_retrained_model_changed_every_weight(digits_model, class_controls):
    assert share_changed(digits_model, class_controls[0])[0] > 0.99


def test_another_architecture_has_no_share(class_request, digits_task, digits_model):
    other = build_model("mlp", (1, 8, 8), 10, seed=0)
    with pytest.raises(InvalidAudit, match="one architecture"):
        share_changed(digits_model, other)
    found, _ = measured(other, class_request, digits_task, original=digits_model)
    assert found["weights_changed"].judgement == Judgement.NOT_RUN
    alone, _ = measured(other, class_request, digits_task)
    assert "original model is not at hand" in alone["weights_changed"].note
