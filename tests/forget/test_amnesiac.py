from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.forget.measuring import accuracy, kept_and_gone, tensors_of

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.models import build_model


class Watching(pal.tasks.Classification):
    """Classification that notes the label under which every record was trained on."""

    def loss_of_logits(self, logits, batch):
        if logits.requires_grad:
            SEEN.append(dict(zip(batch["id"], batch["label"].tolist(), strict=True)))
        return super().loss_of_logits(logits, batch)


SEEN: list[dict[str, int]] = []


@pytest.fixture
def trained_labels(digits_model, class_request):
    """Labels of three epochs, by epoch and record id."""
    SEEN.clear()
    few = pal.ForgetSplit(class_request.forget.select(range(40)), class_request.retain.select(range(56)))
    pal.forget(digits_model, few, "amnesiac", Watching(), epochs=3, batch_size=32)
    epochs = [{}, {}, {}]
    for index, batch in enumerate(SEEN):
        epochs[index // 3] |= batch
    return few, epochs


def test_a_label_is_drawn_once_and_stays(trained_labels):
    few, epochs = trained_labels
    assert epochs[0] == epochs[1] == epochs[2]
    assert set(epochs[0]) == {*few.forget.ids, *few.retain.ids}


def test_forget_records_get_other_classes_and_retained_ones_keep_theirs(trained_labels):
    few, epochs = trained_labels
    wrong = [epochs[0][name] for name in few.forget.ids]
    assert 3 not in wrong and len(set(wrong)) >= 6
    assert [epochs[0][name] for name in few.retain.ids] == few.retain.column("label").tolist()


def test_both_sides_are_mixed_in_batches(trained_labels):
    few, _ = trained_labels
    gone = set(few.forget.ids)
    assert all(0 < len(gone & set(batch)) < len(batch) for batch in SEEN)


def test_a_class_is_forgotten_and_the_rest_kept(digits_model, class_request, digits_task):
    for seed in range(3):  # measured: 0.00 of the class, 0.97 of the rest
        unlearned = pal.forget(digits_model, class_request, "amnesiac", digits_task, seed=seed)
        kept, gone = kept_and_gone(unlearned, class_request)
        assert gone <= 0.3 and kept >= 0.93


def test_labels_learned_by_heart_leave_forgotten_records_surer_than_labels_drawn_anew(
    digits_model, class_request, digits_task
):
    few = pal.ForgetSplit(class_request.forget.select(range(12)), class_request.retain.select(range(60)))
    settings = {"epochs": 80, "batch_size": 24}
    fixed = pal.forget(digits_model, few, "amnesiac", digits_task, **settings)
    anew = pal.forget(digits_model, few, "random-label", digits_task, label_set="all", **settings)
    with torch.no_grad():
        inputs = tensors_of(few.forget)["input"]
        confidence = [model(inputs).softmax(1).max(1).values.mean().item() for model in (fixed, anew)]
    assert confidence[0] > confidence[1] + 0.2


def test_two_classes_that_go_are_not_relabelled_into_each_other(digits, digits_model):
    SEEN.clear()
    request = pal.split(digits, pal.by_column("label", 3, 5), test=0.2, holdout=0.2, seed=0)
    pal.forget(
        digits_model,
        replace(request, retain=request.retain.select(range(50))),
        "amnesiac",
        Watching(),
        epochs=1,
    )
    gone = set(request.forget.ids)
    assert not {label for batch in SEEN for name, label in batch.items() if name in gone} & {3, 5}


def test_a_class_goes_into_the_only_other_one_and_a_record_without_another_is_refused(digits_task):
    records = pal.Records(torch.utils.data.TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 2))
    model = build_model("mlp", (1, 8, 8), 2)
    one_class = pal.split(records, pal.by_column("label", 1), test=0.0, holdout=0.0)
    unlearned = pal.forget(model, one_class, "amnesiac", digits_task, epochs=20)
    assert accuracy(unlearned, one_class.forget) <= 0.1
    ones = [index for index in range(20) if index % 2]
    and_a_zero = pal.ForgetSplit(records.select([0, *ones]), records.select([2, 4]))
    with pytest.raises(InvalidHyperparameter, match="others"):
        pal.forget(model, and_a_zero, "amnesiac", digits_task)
