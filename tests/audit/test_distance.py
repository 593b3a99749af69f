from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import palimpsest as pal
from palimpsest.audit.distance import (
    Distance,
    activation_distance,
    agreement,
    completeness,
    js,
    random_network,
    zrf,
)
from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement
from palimpsest.models import build_model
from tests.audit import planted

LABEL = 3
seeds = st.integers(0, 2**16)


def drawn(seed: int, rows: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(rows, classes, generator=random, dtype=torch.float64).mul(3).softmax(1) for _ in "pq")
    return p, q


def test_models_that_are_sure_of_different_classes_are_as_far_apart_as_can_be():
    p, q = torch.tensor([[1.0, 0, 0]]).double(), torch.tensor([[0, 1.0, 0]]).double()
    assert js(p, q) == pytest.approx(math.log(2)) and js(p, p) == 0
    assert activation_distance(p, q) == pytest.approx(math.sqrt(2))
    assert agreement(p, q) == 0 and completeness(p, q) == 0
    assert zrf(p, p) == zrf(p, p, "batchmean") == 1
    assert zrf(p, q, "batchmean") == pytest.approx(1 - math.log(2))


@given(seeds)
def test_distances_are_symmetric_and_bounded(seed):
    p, q = drawn(seed)
    for measure, most in ((js, math.log(2)), (activation_distance, math.sqrt(2)), (agreement, 1)):
        assert np.allclose(measure(p, q), measure(q, p)) and measure(p, q).shape == (12,)
        assert (measure(p, q) >= -1e-12).all() and (measure(p, q) <= most + 1e-12).all()


@given(seeds)
def test_completeness_is_the_jaccard_index_of_the_sets_of_predictions(seed):
    p, q = drawn(seed)
    mine = set(enumerate(p.argmax(1).tolist()))
    other = set(enumerate(q.argmax(1).tolist()))
    assert completeness(p, q) == pytest.approx(len(mine & other) / len(mine | other))


@given(seeds)
def test_zrf_is_that_of_the_released_definition_or_the_divergence_per_record(seed):
    p, q = drawn(seed)
    m = (p + q) / 2
    released = 0.5 * ((m * (m / p).log()).mean() + (m * (m / q).log()).mean())
    assert zrf(p, q) == zrf(p, q, "elementwise") == pytest.approx(1 - released.item())
    per_record = [
        0.5 * sum((a * (a / b).log()).sum() for a, b in ((x, z), (y, z)))
        for x, y, z in zip(p, q, m, strict=True)
    ]
    assert zrf(p, q, "batchmean") == pytest.approx(1 - float(np.mean(per_record)))


def test_features_of_other_widths_have_no_distance():
    with pytest.raises(InvalidAudit, match="no distance"):
        activation_distance(torch.zeros(3, 4), torch.zeros(3, 5))


@pytest.fixture(scope="module")
def evidence(class_request, digits_task, digits_model, class_controls):
    evidence = Evidence(
        digits_model, class_request, digits_task, pal.Runtime(), digits_model, class_controls[:2]
    )
    Distance().run(evidence)
    return evidence


def run(evidence: Evidence, model: nn.Module) -> dict[str, Finding]:
    return measured(evidence.judging(model))


def measured(evidence: Evidence, **settings) -> dict[str, Finding]:
    findings = Distance(**settings).run(evidence).findings
    for finding in findings:
        numbers = (finding.value, finding.low, finding.high, finding.original, *finding.controls)
        assert all(number is None or math.isfinite(number) for number in numbers), finding
        assert finding.value is None or finding.n > 0
        if finding.low is not None:
            assert finding.low - 1e-9 <= finding.value <= finding.high + 1e-9
    found = {finding.name: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def outputs(model: nn.Module, records) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(records.tensors["input"]).double().softmax(1)


def test_the_distance_to_retrained_models_is_that_of_their_outputs(evidence, class_controls):
    found = run(evidence, class_controls[2])
    for part in ("forget", "retain", "test"):
        records = getattr(evidence.split, part)
        mine, first, second = (outputs(class_controls[k], records).numpy() for k in (2, 0, 1))
        gaps = [np.linalg.norm(mine - other, axis=1).mean() for other in (first, second)]
        assert found[f"{part}_activation_distance"].value == pytest.approx(np.mean(gaps), rel=1e-4)
        same = np.mean([(mine.argmax(1) == other.argmax(1)).mean() for other in (first, second)])
        assert found[f"{part}_agreement"].value == pytest.approx(same)
        among = (first.argmax(1) == second.argmax(1)).mean()
        assert found[f"{part}_agreement"].controls == (pytest.approx(among),)
        assert found[f"{part}_agreement"].n == len(records)


def test_the_untouched_model_is_told_from_a_retrained_one(evidence, digits_model, class_controls):
    untouched, retrained = run(evidence, digits_model), run(evidence, class_controls[2])
    assert untouched["max_change"].value == 0 and retrained["max_change"].value > 0.5
    assert untouched["js_to_original"].k == 1 and untouched["js_to_original"].value == 0
    assert untouched["js_to_original"].judgement == Judgement.SEPARATED
    assert retrained["js_to_original"].judgement == Judgement.AS_RETRAINED
    assert abs(retrained["js_to_original"].k) < 0.3 and retrained["js_to_original"].bears == "lineage"
    for name, better in (("forget_js", -1), ("forget_activation_distance", -1), ("forget_agreement", 1)):
        assert better * (retrained[name].value - untouched[name].value) > 0.1
        assert untouched[name].value == pytest.approx(untouched[name].original)
    assert untouched["forget_completeness"].value < 0.1 < 0.2 < retrained["forget_completeness"].value


@pytest.mark.parametrize("value", [-1e9, float("-inf")])
def test_a_masked_output_gives_finite_distances(evidence, digits_model, value):
    found = run(evidence, planted.MaskedOutput(digits_model, LABEL, value))
    assert found["max_change"].value > 0.9
    assert found["retain_agreement"].value == pytest.approx(found["retain_agreement"].original, abs=0.01)
    assert found["js_to_original"].k < 0.5


def test_infinite_logits_are_certainty(evidence):
    class Sure(nn.Module):
        def forward(self, x):
            return F.one_hot(torch.full((len(x),), 2), 10) * float("inf")

    class Surer(nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 10)
            logits[:, 2] = float("inf")
            return logits

    with pytest.raises(ModelMismatch, match="NaN"):  # 0 times infinity
        run(evidence, Sure())
    assert run(evidence, Surer())["forget_agreement"].value < 0.5


def test_the_units_of_features_are_compared_where_there_are_as_many(evidence, digits_task, digits_model):
    same = run(evidence, planted.head_masked(digits_model, LABEL))["forget_feature_distance"]
    assert same.value == pytest.approx(same.original) and len(same.controls) == 1
    narrow = pal.train(
        build_model("mlp", (1, 8, 8), 10, seed=0, width=20),
        evidence.split.retain,
        digits_task,
        epochs=1,
        seed=0,
    )
    found = run(evidence, narrow)["forget_feature_distance"]
    assert found.judgement == Judgement.NOT_RUN and "20" in found.note


def test_zrf_rises_when_the_outputs_become_those_of_a_random_network(evidence, class_controls, digits_model):
    retrained, untouched = run(evidence, class_controls[2])["zrf"], run(evidence, digits_model)["zrf"]
    assert untouched.value == untouched.original < min(retrained.controls)
    assert untouched.value < retrained.value < 1
    taught = random_network(evidence, "forget").logits.double().softmax(1)
    mine = outputs(digits_model, evidence.split.forget)
    assert untouched.value == pytest.approx(zrf(mine, taught, "batchmean"), abs=1e-6)
    assert taught.max(1).values.mean() < 0.5, "a random network is not sure"


def test_the_random_network_depends_on_the_seed_alone(class_request, digits_task, digits_model):
    def logits(seed):
        evidence = Evidence(digits_model, class_request, digits_task, pal.Runtime(seed=seed))
        return random_network(evidence, "forget").logits

    assert torch.equal(logits(1), logits(1)) and not torch.allclose(logits(1), logits(2))


def test_the_intervals_hold_the_mean_of_further_records(evidence, class_controls):
    """Against the interval of the central limit theorem."""
    found = run(evidence, class_controls[2])["retain_js"]
    rows = np.mean(
        [
            js(outputs(class_controls[2], evidence.split.retain), outputs(other, evidence.split.retain))
            for other in class_controls[:2]
        ],
        0,
    )
    half = 1.96 * rows.std() / math.sqrt(len(rows))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


def test_what_is_missing_is_said(class_request, digits_task, digits_model, class_controls):
    alone = measured(Evidence(digits_model, class_request, digits_task))
    assert {name for name, finding in alone.items() if finding.value is not None} == {"zrf"}
    assert "no retrained model" in alone["forget_js"].note
    assert "original model is not at hand" in alone["js_to_original"].note
    single = measured(
        Evidence(digits_model, class_request, digits_task, controls=class_controls[:1]), zrf=False
    )
    assert single["forget_js"].controls == () and single["forget_js"].original is None and "zrf" not in single
    pair = measured(Evidence(digits_model, class_request, digits_task, original=digits_model))
    assert pair["js_to_original"].bears == "" and pair["max_change"].value == 0
    bare = measured(
        Evidence(digits_model, pal.ForgetSplit(class_request.forget), digits_task, controls=class_controls)
    )
    assert "retain_js" not in bare and bare["forget_js"].value > 0


def test_random_forgetting_is_measured_too(random_request, digits_task, digits_model, random_controls):
    evidence = Evidence(
        random_controls[2], random_request, digits_task, pal.Runtime(), digits_model, random_controls[:2]
    )
    found = measured(evidence)
    assert (
        found["forget_agreement"].value > 0.8 and found["js_to_original"].judgement == Judgement.AS_RETRAINED
    )


def test_models_with_other_numbers_of_classes_cannot_be_compared(evidence):
    with pytest.raises(ModelMismatch, match="both models must give the same"):
        run(evidence, build_model("mlp", (1, 8, 8), 7, seed=0))


def test_the_same_seed_gives_the_same_findings(evidence, class_controls):
    assert run(evidence, class_controls[2]) == run(evidence, class_controls[2])
