"""The protocol of representation-level evaluation, on models of known fate."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.audit._apply import examine
from palimpsest.audit.feature_sets import labels_of, layer_name, sets_of
from palimpsest.audit.set_measures import batches_note, fixed_split, mean_cka, neighbours_on_set
from palimpsest.audit.similarity import batch_cka, batches_of_rows, effective_rank
from palimpsest.audit.uuef import UUEF
from palimpsest.core.auditing import AUDITS
from palimpsest.core.errors import (
    AbsentClass,
    InvalidAudit,
    InvalidHyperparameter,
    InvalidRecords,
    ModelMismatch,
    UnknownName,
)
from palimpsest.core.evidence import Evidence, observe_all
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.models import build_model
from palimpsest.parts.cka import linear_cka, rbf_cka
from tests.audit import planted

LABEL = 3
SETS = ("forget", "retain", "forget_test", "test")


@pytest.fixture(scope="module")
def held_out(class_request):
    """A downstream set: two digits of the holdout, under labels that are no classes of the model."""
    records = class_request.holdout
    labels = records.column("label")
    mask = np.isin(labels, (4, 9))
    data = TensorDataset(
        records.tensors["input"][torch.from_numpy(mask)], torch.from_numpy(labels[mask] + 100)
    )
    return pal.Records(data)


@pytest.fixture(scope="module")
def evidence(class_request, digits_task, digits_model, class_controls, held_out):
    """Two controls; the third retraining is there to be judged."""
    made = Evidence(digits_model, class_request, digits_task, pal.Runtime(), digits_model, class_controls[:2])
    UUEF(downstream={"fours and nines": held_out}).run(made)  # shared by all tests
    return made


@pytest.fixture(scope="module")
def few(evidence):
    """The same models on 60 records of each part and, for retained ones, 100."""
    parts = evidence.split
    small = pal.ForgetSplit(
        parts.forget.select(range(60)), parts.retain.select(range(100)), parts.test.select(range(100))
    )
    return Evidence(
        evidence.unlearned, small, evidence.task, pal.Runtime(), evidence.original, evidence.controls
    )


def by_name(outcome: Outcome) -> dict[str, Finding]:
    found = {finding.name: finding for finding in outcome.findings}
    assert len(found) == len(outcome.findings)
    for finding in outcome.findings:
        numbers = (finding.value, finding.low, finding.high, finding.k, finding.original, *finding.controls)
        assert all(number is None or math.isfinite(number) for number in numbers), finding
    return found


def run(evidence: Evidence, model: nn.Module, **settings) -> dict[str, Finding]:
    return by_name(UUEF(**settings).run(evidence.judging(model)))


def features(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Input of the head, by a hook of the test's own."""
    seen: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _m, given: seen.append(given[0].double()))
    with torch.no_grad():
        model.eval()(inputs)
    handle.remove()
    return seen[0]


# Batches


def test_a_short_last_batch_joins_the_one_before_or_is_left_out():
    assert batches_of_rows(40, 16, fewest=16) == [slice(0, 16), slice(16, 32)]
    assert batches_of_rows(40, 16, fewest=16, short="merge") == [slice(0, 16), slice(16, 40)]
    assert batches_of_rows(48, 16, fewest=16) == [slice(0, 16), slice(16, 32), slice(32, 48)]
    assert (
        batches_of_rows(5, 16, fewest=16) == batches_of_rows(5, 16, fewest=16, short="merge") == [slice(0, 5)]
    )


@pytest.mark.parametrize(("kernel", "similarity"), [("linear", linear_cka), ("rbf", rbf_cka)])
@pytest.mark.parametrize("debiased", [False, True])
def test_the_reported_cka_is_the_unweighted_mean_over_batches(kernel, similarity, debiased):
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(70, 5, generator=random), torch.randn(70, 9, generator=random)
    y[:, :5] += x
    cuts = [slice(0, 32), slice(32, 70)]
    expected = np.mean([similarity(x[cut], y[cut], debiased=debiased) for cut in cuts])
    value, batches = mean_cka(x, y, 32, kernel, debiased)
    assert value == pytest.approx(expected) and batches == 2
    order = torch.randperm(70, generator=random)
    mixed = np.mean([similarity(x[order][cut], y[order][cut], debiased=debiased) for cut in cuts])
    assert mean_cka(x, y, 32, kernel, debiased, order=order)[0] == pytest.approx(mixed)
    assert mixed != pytest.approx(expected, abs=1e-6)


def test_a_batch_whose_features_do_not_vary_is_an_error_and_as_released_not_a_number():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[20:] = 1.0
    with pytest.raises(InvalidAudit, match="same for all records"):
        batch_cka(x, x, 20)
    released = batch_cka(x, x, 20, as_released=True)
    assert released[0] == pytest.approx(1) and math.isnan(released[1])


def test_the_effective_rank_counts_directions_of_equal_spread():
    x = torch.zeros(400, 6, dtype=torch.float64)
    for axis in range(3):
        x[axis * 100, axis], x[axis * 100 + 1, axis] = 1, -1
    assert effective_rank(x) == pytest.approx(3)
    assert effective_rank(x.T.contiguous()[:3]) <= 3


def test_class_pure_and_small_batches_are_said_so():
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    labels = np.repeat(np.arange(8), 8)
    assert "1.0 of 8 classes" not in batches_note(x, labels, 64, 1)
    assert "2.0 of 8 classes" in batches_note(x, labels, 16, 4)
    assert "few for an effective rank" in batches_note(x, labels, 16, 4)
    assert "few for" not in batches_note(x[:, :2].repeat(40, 1), np.repeat(labels, 40), 512, 5)


# Neighbours


def test_the_split_is_fixed_and_its_queries_are_a_fifth():
    fit, queries = fixed_split(103)
    assert (len(fit), len(queries)) == (82, 21) and sorted([*fit, *queries]) == list(range(103))
    assert fixed_split(103)[1].tolist() == queries.tolist() != fixed_split(103, seed=3)[1].tolist()
    with pytest.raises(InvalidAudit, match="1 rows cannot be split"):
        fixed_split(1)


def test_neighbours_are_those_of_scikit_learn_on_the_same_split():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 90)
    rows = random.normal(size=(90, 4)) + labels[:, None]
    fit, queries = fixed_split(90, 7)
    judge = KNeighborsClassifier(3, metric="cosine").fit(rows[fit], labels[fit])
    assert neighbours_on_set(rows, labels, 3, 7) == (judge.score(rows[queries], labels[queries]), 18)
    half = fit[:36]
    judge = KNeighborsClassifier(3, metric="cosine").fit(rows[half], labels[half])
    assert neighbours_on_set(rows, labels, 3, 7, share=0.5)[0] == judge.score(rows[queries], labels[queries])


def test_a_set_of_one_class_has_neighbours_beside_it_or_is_refused():
    random = np.random.default_rng(0)
    rows, others = random.normal(size=(30, 4)), random.normal(size=(30, 4))
    with pytest.raises(InvalidAudit, match="1 class"):
        neighbours_on_set(rows, np.zeros(30, int))
    rate, n = neighbours_on_set(rows, np.zeros(30, int), beside=(others, np.ones(30, int)))
    assert 0 < rate < 1 and n == 6
    with pytest.raises(InvalidAudit, match="40 neighbours were asked for, but there are 24"):
        neighbours_on_set(rows, np.arange(30) % 2, 40)


# Models of known fate


def test_a_changed_head_is_exposed_and_called_suppressed(evidence, digits_model):
    cheat = planted.head_masked(digits_model, LABEL)
    report = examine(evidence.judging(cheat), ["utility", "uuef"])
    found = {finding.name: finding for finding in report.findings if finding.audit == "uuef"}
    utility = {finding.name: finding for finding in report.findings if finding.audit == "utility"}
    assert utility["forget_accuracy"].value == 0
    assert utility["test_accuracy"].value >= utility["test_accuracy"].original
    for name in SETS:
        assert found[f"{name}_cka_to_original"].value == pytest.approx(1, abs=1e-9)
        assert found[f"{name}_knn"].value == found[f"{name}_knn"].original
        assert found[f"{name}_cka_to_retrained"].value == found[f"{name}_cka_to_retrained"].original
    assert found["agl"].value > 0.9 > 0.1 > found["agl"].original
    assert found["agr"].value == found["agr"].original < min(found["agr"].controls)
    assert found["h_lr"].value < min(found["h_lr"].controls)
    assert report.verdict == "suppressed"
    [reason] = [line for line in report.reasons if line.startswith("uuef.forget_cka_to_original")]
    assert "the features are the original's" in reason


def test_neighbours_on_logits_see_the_changed_head_and_those_on_features_do_not(evidence, digits_model):
    cheat = copy.deepcopy(digits_model)
    with torch.no_grad():
        cheat.head.weight.zero_()
        cheat.head.weight[:, :2] = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    found = run(evidence, cheat)
    assert found["retain_knn"].value == found["retain_knn"].original
    assert found["retain_knn_logits"].value < found["retain_knn_logits"].original - 0.1


def test_a_retrained_model_is_as_the_retrained_models_are(evidence, class_controls):
    report = examine(evidence.judging(class_controls[2]), ["utility", "uuef"])
    found = {finding.name: finding for finding in report.findings if finding.audit == "uuef"}
    assert report.verdict == "removed"
    assert found["forget_cka_to_original"].judgement == Judgement.AS_RETRAINED
    assert found["forget_cka_to_original"].bears == "lineage"
    for name in SETS:
        assert found[f"{name}_cka_to_retrained"].value == pytest.approx(
            found[f"{name}_cka_to_retrained"].controls[0], abs=0.1
        )
    assert found["agr"].value > found["agr"].original and found["h_lr"].value > 0.7


def test_features_wrecked_by_gradient_ascent_fall_below_the_retrained_ones(evidence, digits_model):
    model, gone, kept = (
        copy.deepcopy(digits_model),
        evidence.split.forget.tensors,
        evidence.split.retain.tensors,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(kept["input"]).argmax(1) == kept["label"]).float().mean())

    start = accuracy()
    for _ in range(200):
        if accuracy() <= start / 2:
            break
        optimizer.zero_grad()
        (-nn.functional.cross_entropy(model(gone["input"]), gone["label"])).backward()
        optimizer.step()
    assert accuracy() <= start / 2
    found = run(evidence, model)
    assert found["retain_cka_to_retrained"].value < min(found["retain_cka_to_retrained"].controls) - 0.2
    assert found["agr"].value < found["agr"].original and found["agl"].value < min(found["agl"].controls)


def test_the_untouched_original_is_intact(evidence, digits_model):
    report = examine(evidence.judging(copy.deepcopy(digits_model)), ["utility", "uuef"])
    assert report.verdict == "intact"


# What is measured is what it says


def test_figures_are_those_of_the_features_themselves(evidence, digits_model, class_controls, class_request):
    model = class_controls[2]
    found = run(evidence, model)
    inputs = class_request.forget.tensors["input"]
    mine, first = features(model, inputs), features(digits_model, inputs)
    assert found["forget_cka_to_original"].value == pytest.approx(linear_cka(mine, first), abs=1e-6)
    among = [linear_cka(mine, features(control, inputs)) for control in class_controls[:2]]
    assert found["forget_cka_to_retrained"].value == pytest.approx(np.mean(among), abs=1e-6)
    kept = class_request.retain.tensors
    rows = features(model, kept["input"]), features(digits_model, kept["input"])
    batches = [linear_cka(rows[0][cut], rows[1][cut]) for cut in (slice(0, 512), slice(512, None))]
    assert found["retain_cka_to_original"].value == pytest.approx(np.mean(batches), abs=1e-6)
    expected = neighbours_on_set(rows[0].numpy(), kept["label"].numpy())
    assert (found["retain_knn"].value, found["retain_knn"].n) == expected


def test_downstream_labels_need_not_be_the_models_classes(evidence, class_controls, held_out):
    found = run(evidence, class_controls[2], downstream={"fours and nines": held_out})
    rows = features(class_controls[2], held_out.tensors["input"]).numpy()
    rate, n = neighbours_on_set(rows, held_out.column("label"))
    assert (found["fours and nines_knn"].value, found["fours and nines_knn"].n) == (rate, n)
    assert "neighbours on forget, retain, fours and nines" in found["agr"].note
    assert "fours" not in found["agl"].note
    only = run(
        evidence, class_controls[2], downstream={"fours and nines": held_out}, agr_sets=["fours and nines"]
    )
    assert only["agr"].value != found["agr"].value


def test_a_downstream_set_can_be_named_in_a_recipe(evidence, class_controls):
    audit = UUEF(downstream={"low": {"data": "digits", "labels": [0, 1]}})
    outcome = audit.run(evidence.judging(class_controls[2]))
    [row] = [row for row in outcome.series["uuef"] if row["set"] == "low" and row["model"] == "unlearned"]
    digits = pal.load_data("digits")
    assert row["rows"] == int(np.isin(digits.column("label"), (0, 1)).sum()) and row["downstream"]


def test_the_composites_are_the_products_that_they_are_said_to_be(evidence, class_controls):
    outcome = UUEF().run(evidence.judging(class_controls[2]))
    found, table = by_name(outcome), pd.DataFrame(outcome.series["uuef"]).set_index(["model", "set"])
    products = []
    for control in ("control 0", "control 1"):
        accuracy = [1 - abs(table.accuracy["unlearned", s] - table.accuracy[control, s]) for s in SETS]
        votes = [
            1 - abs(table.knn_features["unlearned", s] - table.knn_features[control, s]) for s in SETS[:2]
        ]
        products.append((np.prod(accuracy), np.prod(votes)))
    similar = {
        index: math.prod(
            linear_or_mean(evidence, class_controls[2], control, part) for part in ("forget", "retain")
        )
        for index, control in enumerate(class_controls[:2])
    }
    agl = [one for one, _ in products]
    agr = [votes * similar[index] for index, (_, votes) in enumerate(products)]
    assert found["agl"].value == pytest.approx(np.mean(agl))
    assert found["agr"].value == pytest.approx(np.mean(agr), abs=1e-6)
    both = [2 * a * b / (a + b) for a, b in zip(agl, agr, strict=True)]
    assert found["h_lr"].value == pytest.approx(np.mean(both), abs=1e-6)
    for name in ("agl", "agr", "h_lr"):
        assert "our aggregation" in found[name].note


def linear_or_mean(evidence: Evidence, one: nn.Module, other: nn.Module, part: str) -> float:
    inputs = evidence.records(part).tensors["input"]
    x, y = features(one, inputs), features(other, inputs)
    return float(np.mean([linear_cka(a, b) for a, b in zip(x.split(512), y.split(512), strict=True)]))


def test_the_table_has_a_row_per_model_and_set_with_gaps_and_the_random_reference(evidence, class_controls):
    outcome = UUEF().run(evidence.judging(class_controls[2]))
    table = pd.DataFrame(outcome.series["uuef"])
    assert len(table) == 5 * 4 and not table.duplicated(["model", "set"]).any()
    assert set(table["model"]) == {"original", "unlearned", "control 0", "control 1", "random"}
    assert set(table["layer"]) == {"the input of the head"}
    assert table.set_index("set")["batches"].groupby("set").first().to_dict() == {
        "forget": 1, "retain": 2, "forget_test": 1, "test": 1,
    }  # fmt: skip
    rows = table.set_index(["model", "set"])
    for column in ("accuracy", "cka_to_original", "knn_features", "knn_logits"):
        controls = [rows[column][f"control {i}", "retain"] for i in range(2)]
        assert rows[f"{column}_gap"]["unlearned", "retain"] == pytest.approx(
            rows[column]["unlearned", "retain"] - np.mean(controls)
        )
        assert rows[f"{column}_gap"]["control 0", "retain"] == pytest.approx(controls[0] - controls[1])
    assert rows["accuracy"]["random", "test"] < 0.3 < rows["accuracy"]["unlearned", "test"]
    found = by_name(outcome)
    above = found["retain_knn_above_random"]
    assert above.value == pytest.approx(
        rows["knn_features"]["unlearned", "retain"] - rows["knn_features"]["random", "retain"]
    )
    assert "with random weights" in found["retain_knn"].note


def test_the_debiased_value_stands_beside_the_biased_one(evidence, class_controls, class_request):
    outcome = UUEF().run(evidence.judging(class_controls[2]))
    rows = pd.DataFrame(outcome.series["uuef"]).set_index(["model", "set"])
    inputs = class_request.forget.tensors["input"]
    mine = features(class_controls[2], inputs)
    expected = np.mean([linear_cka(mine, features(c, inputs), True) for c in class_controls[:2]])
    assert rows["cka_to_retrained_debiased"]["unlearned", "forget"] == pytest.approx(expected, abs=1e-6)


def test_layers_are_compared_one_by_one_and_the_outputs_last(evidence, digits_model):
    outcome = UUEF().run(evidence.judging(planted.head_masked(digits_model, LABEL)))
    rows = pd.DataFrame(outcome.series["uuef_layers"])
    mine = rows[(rows["model"] == "unlearned") & (rows["against"] == "original") & (rows["set"] == "forget")]
    assert mine.sort_values("order")["layer"].tolist() == ["conv1", "conv2", "fc", "head"]
    assert mine["cka"].tolist() == pytest.approx([1.0] * 4), "a constant added to every row changes nothing"
    assert set(rows["against"]) == {"original", "control"} and set(rows["set"]) == set(SETS)


def test_features_can_be_taken_at_any_layer(few, digits_model, class_controls):
    found = run(few, class_controls[2], layer="fc")
    seen = [
        observe_all(model, few.split.forget, few.task, pal.Runtime()).layers["fc"]
        for model in (class_controls[2], digits_model)
    ]
    assert found["forget_cka_to_original"].value == pytest.approx(linear_cka(*seen), abs=1e-6)
    wrapped = planted.MaskedOutput(digits_model, LABEL)
    assert layer_name(wrapped, "fc") == "model.fc"
    assert run(few, wrapped, layer="fc")["forget_cka_to_original"].value == pytest.approx(1)


def test_mixing_changes_the_batches_alike_for_all_models(few, digits_model, class_controls):
    how = {"batch_size": 64, "picture": 0}
    stored, mixed = (run(few, class_controls[2], order=order, **how) for order in ("stored", "mixed"))
    assert stored["retain_cka_to_original"].value != mixed["retain_cka_to_original"].value
    assert stored["forget_cka_to_original"].value == pytest.approx(mixed["forget_cka_to_original"].value)
    same = run(few, planted.head_masked(digits_model, LABEL), order="mixed", **how)
    assert same["retain_cka_to_original"].value == pytest.approx(1)


def test_gaussian_kernels_are_an_option(few, class_controls, digits_model):
    found = run(few, class_controls[2], kernel="rbf", picture=0)
    inputs = few.split.forget.tensors["input"]
    expected = rbf_cka(features(class_controls[2], inputs), features(digits_model, inputs))
    assert found["forget_cka_to_original"].value == pytest.approx(expected, abs=1e-6)


# The picture


def test_the_picture_shows_the_forgotten_class_where_it_lies(evidence, digits_model):
    outcome = UUEF(picture=30).run(evidence.judging(planted.head_masked(digits_model, LABEL)))
    rows = pd.DataFrame(outcome.series["features"])
    assert rows.groupby(["model", "group"]).size().to_dict() == {
        (model, group): 30
        for model in ("original", "unlearned", "control 0")
        for group in ("class 3", "retained")
    }
    points = {model: rows[rows["model"] == model][["x", "y"]].to_numpy() for model in set(rows["model"])}
    assert points["unlearned"] == pytest.approx(points["original"], abs=1e-6)
    assert np.abs(points["control 0"] - points["original"]).max() > 0.1
    assert (points["original"] ** 2).sum(1).mean() == pytest.approx(1) and rows["share"].between(0, 1).all()
    assert "features" not in UUEF(picture=0).run(evidence).series


def test_random_records_are_coloured_by_their_part(random_request, digits_task, digits_model, class_controls):
    small = pal.ForgetSplit(
        random_request.forget, random_request.retain.select(range(200)), random_request.test
    )
    made = Evidence(class_controls[2], small, digits_task, pal.Runtime(), digits_model, class_controls[:2])
    outcome = UUEF(picture=20).run(made)
    assert {row["group"] for row in outcome.series["features"]} == {"forgotten", "retained"}
    found = by_name(outcome)
    assert "forget_test_knn" not in found and found["forget_knn"].value > 0.5


# What is missing, and bad input


def test_without_original_or_retrained_models_the_rest_is_measured(class_request, digits_task, digits_model):
    found = by_name(UUEF().run(Evidence(digits_model, class_request, digits_task)))
    assert {name for name, f in found.items() if f.value is not None} == {
        f"{name}{suffix}" for name in SETS for suffix in ("_knn", "_knn_logits", "_knn_above_random")
    }
    assert "no retrained model" in found["agl"].note and "not at hand" in found["forget_cka_to_original"].note
    pair = by_name(UUEF().run(Evidence(digits_model, class_request, digits_task, original=digits_model)))
    assert pair["forget_cka_to_original"].value == pytest.approx(1)
    assert pair["forget_cka_to_original"].bears == "", "without a retrained model nobody knows what is close"


def test_it_runs_when_it_is_named():
    card = AUDITS.get("uuef").card
    assert not card.default and card.code == "C1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batch_size": 15}, "batch_size"),
        ({"neighbours": 0}, "neighbours"),
        ({"retain_share": 0.0}, "retain_share"),
        ({"order": "sorted"}, "sorted"),
        ({"kernel": "cosine"}, "cosine"),
        ({"short": "keep"}, "keep"),
        ({"picture": -1}, "picture"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(InvalidHyperparameter, match=named):
        UUEF(**settings)


def test_what_cannot_be_used_is_refused_before_any_work(evidence, held_out):
    with pytest.raises(InvalidAudit, match=r"no layer 'avgpool'; its layers are conv1, conv2, fc, head"):
        UUEF(layer="avgpool").run(evidence)
    with pytest.raises(InvalidAudit, match="part of the split"):
        UUEF(downstream={"test": held_out}).run(evidence)
    with pytest.raises(InvalidAudit, match="agr_sets names 'birds'"):
        UUEF(agr_sets=["birds"]).run(evidence)
    with pytest.raises(InvalidAudit, match="`data`"):
        UUEF(downstream={"birds": "digits"}).run(evidence)
    with pytest.raises(AbsentClass, match="label = 11"):
        UUEF(downstream={"birds": {"data": "digits", "labels": [11]}}).run(evidence)
    with pytest.raises(UnknownName, match="digits"):
        UUEF(downstream={"birds": {"data": "digit"}}).run(evidence)
    bare = pal.Records(TensorDataset(held_out.tensors["input"]))
    with pytest.raises(InvalidRecords, match="no labels"):
        sets_of(evidence, {"birds": bare})
    halves = pal.Records(TensorDataset(held_out.tensors["input"], torch.rand(len(held_out))))
    with pytest.raises(InvalidRecords, match="integers"):
        labels_of(halves, evidence.task, evidence.runtime)
    with pytest.raises(InvalidAudit, match="holds no record"):
        sets_of(evidence, {"birds": held_out.select([])})


def test_downstream_inputs_that_the_model_cannot_take_are_not_run(evidence, digits_model):
    wide = pal.Records(TensorDataset(torch.rand(40, 1, 12, 12), torch.arange(40) % 2))
    found = run(evidence, digits_model, downstream={"wide": wide})
    assert found["wide_knn"].judgement == Judgement.NOT_RUN and "fails on a batch" in found["wide_knn"].note
    assert found["retain_knn"].value is not None


def test_models_of_another_output_size_have_no_common_accuracy(evidence, digits_model):
    wider = build_model("small_cnn", (1, 8, 8), 12, seed=1)
    wider = pal.train(wider, evidence.split.retain, evidence.task, epochs=1)
    found = run(evidence, wider)
    assert "differ in their number of outputs" in found["agl"].note and found["agl"].value is None
    assert found["agr"].value is not None


class Dead(nn.Module):
    """Features that are the same for every record."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.relu(self.body(x.flatten(1)) - 1e6))


class Exploding(Dead):
    """Features that overflow, with finite outputs."""

    def forward(self, x):
        self.head(torch.full((len(x), 16), float("inf")))
        return x.flatten(1)[:, :10]


@pytest.mark.parametrize(("model", "reason"), [(Dead(), "same for all records"), (Exploding(), "NaN or Inf")])
def test_features_that_cannot_be_compared_are_said_so(evidence, model, reason):
    outcome = UUEF().run(evidence.judging(model))
    found = by_name(outcome)
    for name in ("forget_cka_to_original", "retain_cka_to_retrained", "agr", "h_lr"):
        assert found[name].judgement == Judgement.NOT_RUN and reason in found[name].note
    assert {row["model"] for row in outcome.series["features"]} == {"original", "control 0"}


def test_fewer_than_three_records_are_not_compared(few, digits_task, digits_model, class_controls):
    two = pal.ForgetSplit(few.split.forget.select([0, 1]), few.split.retain)
    found = by_name(
        UUEF().run(Evidence(digits_model, two, digits_task, pal.Runtime(), digits_model, class_controls[:1]))
    )
    assert "at least 3 rows" in found["forget_cka_to_original"].note
    assert "at least 3 rows" in found["agr"].note and found["agr"].value is None
    assert found["retain_cka_to_original"].value is not None


def test_more_neighbours_than_rows_are_not_run(few, class_controls):
    found = run(few, class_controls[2], neighbours=90)
    assert "90 neighbours were asked for" in found["test_knn"].note and found["test_knn"].value is None
    assert found["forget_knn"].value is not None, "48 of its own and 80 retained records"


# Other networks, and leaving things as they were


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_large_vision_models_are_compared_at_a_named_layer(name, digits_task):
    settings = {"img_size": 32} if name.startswith("timm") else {}
    models = [build_model(name, (3, 32, 32), 4, seed=seed, **settings).train() for seed in range(3)]
    random = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(40, 3, 32, 32, generator=random), torch.arange(40) % 4)
    request = pal.split(pal.Records(data), pal.by_column("label", 2, 3), test=0.2, holdout=0.0)
    states = [copy.deepcopy(model.state_dict()) for model in models]
    made = Evidence(models[0], request, digits_task, pal.Runtime(), models[1], models[2:])
    layer = "avgpool" if name.startswith("torchvision") else "norm"
    found = by_name(UUEF(layer=layer).run(made))
    assert 0 < found["forget_cka_to_original"].value < 1 and found["forget_knn"].value is not None
    assert f"of {layer}" in found["forget_cka_to_original"].note
    for model, state in zip(models, states, strict=True):
        assert model.training
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_findings(few, digits_task, digits_model, class_controls, held_out):
    def once() -> Outcome:
        made = Evidence(
            class_controls[0],
            few.split,
            digits_task,
            pal.Runtime(seed=4),
            digits_model,
            class_controls[1:2],
        )
        return UUEF(order="mixed", downstream={"held": held_out}).run(made)

    assert once() == once()


def test_a_second_model_is_judged_as_it_would_be_alone(few, class_controls, held_out):
    audit = UUEF(downstream={"fours and nines": held_out})
    audit.run(few.judging(class_controls[1]))
    shared = audit.run(few.judging(class_controls[2]))
    fresh = Evidence(class_controls[2], few.split, few.task, pal.Runtime(), few.original, few.controls)
    assert audit.run(fresh) == shared


def test_large_downstream_sets_are_sampled_alike(evidence, class_controls, held_out):
    from dataclasses import replace

    small = replace(evidence.judging(class_controls[2]), limit=30, _observed={}, _parts={}, _memory={})
    item = sets_of(small, {"held": held_out})[-1]
    again = sets_of(small, {"held": held_out})[-1]
    assert len(item.records) == 30 and item.records.ids == again.records.ids
    assert item.labels.tolist() == item.records.column("label").tolist()


def test_a_model_that_fails_is_told_by_the_pass(evidence, held_out):
    from palimpsest.audit.feature_sets import pass_over

    with pytest.raises(ModelMismatch):
        pass_over(nn.Linear(3, 2), held_out, evidence.task, pal.Runtime())
