import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.forget.measuring import kept_and_gone
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.runtime import Runtime
from palimpsest.forget.classifier.random_label import false_labels, other_labels, relabelled


def relabel(model, request, task, **settings):
    return pal.forget(model, request, "random-label", task, seed=0, **settings)


@pytest.mark.parametrize("label", [0, 3, 7])
@pytest.mark.parametrize("order", ["mixed", "sequential"])
def test_the_class_is_forgotten_and_the_rest_kept(order, label, digits, digits_model, digits_task):
    """Measured: nothing of the class is left, 0.96 or more of the rest, in both orders."""
    request = pal.split(digits, pal.by_column("label", label), test=0.2, holdout=0.2, seed=0)
    kept, gone = kept_and_gone(relabel(digits_model, request, digits_task, order=order), request)
    assert gone <= 0.3 and kept >= 0.93


def test_all_labels_of_the_published_code_forget_too(digits_model, class_request, digits_task):
    unlearned = relabel(digits_model, class_request, digits_task, label_set="all")
    kept, gone = kept_and_gone(unlearned, class_request)
    assert gone <= 0.4 and kept >= 0.93


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    forgotten=st.sets(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 100),
)
def test_other_labels_are_neither_true_nor_forgotten(labels, forgotten, seed):
    true = torch.tensor(labels)
    drawn = other_labels(true, 6, sorted(forgotten), torch.Generator().manual_seed(seed))
    assert not (drawn == true).any()
    assert not set(drawn.tolist()) & forgotten
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 6


def test_other_labels_are_uniform():
    drawn = other_labels(torch.zeros(6000, dtype=torch.long), 5, [2], torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=5)
    assert counts[0] == counts[2] == 0
    assert all(abs(int(counts[label]) - 2000) < 150 for label in (1, 3, 4))


def epochs_of(request, task, model, label_set, order, count=2):
    """False labels by record id, and true ones as they were passed on, of some epochs."""
    runtime = Runtime(seed=0)
    draw = false_labels(model, request, task, runtime, label_set)
    generator = runtime.generator("order")
    return [
        {
            name: int(label)
            for batch in relabelled(request, task, runtime, draw, order, 32, generator)
            for name, label in zip(batch["id"], batch["label"], strict=True)
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("order", ["mixed", "sequential"])
@pytest.mark.parametrize("label_set", ["others", "all"])
def test_only_forget_records_are_relabelled(
    label_set, order, digits_model, digits_task, class_request, random_request
):
    for request in (class_request, random_request):
        true = {
            name: int(label)
            for part in (request.forget, request.retain)
            for name, label in zip(part.ids, part.column("label"), strict=True)
        }
        gone = set(request.forget.ids)
        first, second = epochs_of(request, digits_task, digits_model, label_set, order)
        assert all(first[name] == true[name] for name in first if name not in gone)
        same = {name for name in gone & first.keys() & second.keys() if first[name] == second[name]}
        hits = {name for name in gone & first.keys() if first[name] == true[name]}
        if label_set == "others":
            assert same == gone & first.keys() & second.keys()
            assert not hits
        else:
            assert 0 < len(same) < 0.3 * len(gone)
            assert 0 < len(hits) < 0.3 * len(gone)


def test_forgotten_classes_are_not_relabelled_into_each_other(digits, digits_model, digits_task):
    request = pal.split(digits, pal.by_column("label", 3, 5), test=0.2, holdout=0.2, seed=0)
    (labels,) = epochs_of(request, digits_task, digits_model, "others", "mixed", count=1)
    assert not {labels[name] for name in request.forget.ids if name in labels} & {3, 5}


def test_half_a_class_may_be_relabelled_into_any_other(digits, digits_model, digits_task):
    request = pal.split(digits, pal.by_column("label", 3) & pal.by_fraction(0.5), test=0.2, holdout=0.2)
    (labels,) = epochs_of(request, digits_task, digits_model, "others", "mixed", count=1)
    assert {labels[name] for name in request.forget.ids if name in labels} == set(range(10)) - {3}


def two_classes(rule):
    records = pal.Records(TensorDataset(torch.rand(40, 3), torch.arange(40) % 2))
    return pal.split(records, rule, test=0, holdout=0)


def test_no_class_left_to_relabel_into_is_refused(digits_task):
    request = two_classes(pal.by_column("label", 1) | pal.by_ids(["0"]))
    with pytest.raises(InvalidHyperparameter, match="label_set='all'"):
        relabel(nn.Linear(3, 2), request, digits_task)
    relabel(nn.Linear(3, 2), request, digits_task, label_set="all")
    relabel(nn.Linear(3, 2), two_classes(pal.by_column("label", 1)), digits_task)


def test_fewer_than_two_classes_are_refused(digits_task):
    records = pal.Records(TensorDataset(torch.rand(40, 3), torch.zeros(40, dtype=torch.long)))
    request = pal.split(records, pal.by_fraction(0.5), test=0, holdout=0)
    with pytest.raises(ModelMismatch, match="at least 2 classes"):
        relabel(nn.Linear(3, 1), request, digits_task)


@pytest.mark.parametrize("settings", [{"label_set": "other"}, {"order": "shuffled"}])
def test_unknown_choices_are_refused(settings, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match=next(iter(settings))):
        relabel(digits_model, class_request, digits_task, **settings)


def test_nothing_is_relabelled_into_a_class_that_an_earlier_request_took(digits, digits_model, digits_task):
    later = digits.select(digits.column("label") != 5)
    request = pal.split(later, pal.by_column("label", 3), test=0.2, holdout=0.2, seed=0)
    runtime = pal.Runtime(seed=0)
    draw = false_labels(digits_model, request, digits_task, runtime, "others")
    drawn = {int(label) for batch in runtime.batches(request.forget, digits_task) for label in draw(batch)}
    assert drawn == {0, 1, 2, 4, 6, 7, 8, 9}
