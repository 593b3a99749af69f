"""The bi-level search: what it asks of the lower level, what it finds, how it goes on after an interrupt."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    CannotWrite,
    DuplicateIds,
    InvalidHyperparameter,
    InvalidLabels,
    InvalidRecipe,
    InvalidRecords,
    MissingNeed,
    ModelMismatch,
    NonFinite,
    NonFiniteLoss,
    UnknownName,
)
from palimpsest.core.needs import Need
from palimpsest.core.unlearner import Card
from palimpsest.models import build_model
from palimpsest.study.worst_case import Search, WorstCase, worst_case
from palimpsest.study.worst_case.lower_level import record_losses
from tests.forget.measuring import fingerprint, tensors_of

NEEDS = frozenset({Need.MODEL, Need.RETAIN_DATA})


@dataclass(frozen=True)
class SpyOnSets:
    """A method without weights: gives the model back, and remembers what it was asked to forget."""

    card = Card("spy-on-sets", "", NEEDS, ("any",), None)
    asked: list = field(default_factory=list, compare=False)

    def unlearn(self, model, split, task, runtime):
        self.asked.append((set(split.forget.ids), set(split.retain.ids), fingerprint(model), runtime.seed))
        return model


@dataclass(frozen=True)
class SpyOnWeights:
    """A method with weights that remembers them; stops after so many calls."""

    card = Card("spy-on-weights", "", NEEDS, ("any",), None)
    asked: list = field(default_factory=list, compare=False)
    stop_after: int | None = field(default=None, compare=False)

    def unlearn(self, model, split, task, runtime):
        raise AssertionError("a method that takes weights is given weights")

    def unlearn_weighted(self, model, records, weights, task, runtime):
        if self.stop_after is not None and len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((np.array(weights), fingerprint(model), runtime.seed))
        noisy = build_model("mlp", (6,), 3, seed=runtime.seed % 1000, width=8)
        return noisy


@pytest.fixture(scope="module")
def blobs():
    """Sixty points in three classes, ten of them with a wrong label, and a network trained on them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    centres = 2 * torch.randn(3, 6, generator=generator)
    x = centres[labels] + 0.4 * torch.randn(60, 6, generator=generator)
    labels = labels.clone()
    labels[:10] = (labels[:10] + 1) % 3
    return pal.Records(TensorDataset(x, labels), ids=[f"p{i}" for i in range(60)])


@pytest.fixture(scope="module")
def trained(blobs, digits_task):
    return pal.train(build_model("mlp", (6,), 3, seed=0, width=16), blobs, digits_task, epochs=30, lr=3e-3)


# What is found


@pytest.mark.parametrize("lower", ["sign-finetune", "sign-retrain", "finetune"])
def test_records_that_contradict_the_others_are_easiest_to_forget_and_never_hardest(
    blobs, trained, digits_task, lower
):
    wrong = {f"p{i}" for i in range(10)}
    settings = {"lower_settings": {"epochs": 40, "lr": 5e-3}, "steps": 3, "upper_lr": 10.0}
    hard, easy = (
        worst_case(trained, blobs, digits_task, 10, lower, goal=goal, **settings)
        for goal in ("hardest", "easiest")
    )
    assert len(set(hard.ids)) == len(set(easy.ids)) == 10
    assert not set(hard.ids) & wrong and len(set(easy.ids) & wrong) >= 8
    assert (hard.caution == "") == lower.startswith("sign-")


def test_retraining_still_knows_the_hardest_set_and_no_longer_the_easiest(blobs, trained, digits_task):
    errors = {}
    for goal in ("hardest", "easiest"):
        found = worst_case(trained, blobs, digits_task, 10, goal=goal, steps=4, upper_lr=10.0)
        parts = pal.split(blobs, found.selection(), test=0.0, holdout=0.0)
        assert sorted(parts.forget.ids) == sorted(found.ids)
        retrained = pal.forget(trained, parts, "retrain", digits_task, seed=3)
        tensors = tensors_of(parts.forget)
        errors[goal] = float((retrained(tensors["input"]).argmax(1) != tensors["label"]).float().mean())
    assert errors["hardest"] == 0 and errors["easiest"] >= 0.7


def test_a_tiny_upper_rate_does_not_move_the_set_and_the_result_says_so(blobs, trained, digits_task):
    slow, fast = (
        worst_case(trained, blobs, digits_task, 12, steps=3, upper_lr=rate) for rate in (1e-3, 10.0)
    )
    assert slow.moved == 0 and "barely moved" in slow.warning and "0.001" in slow.warning
    assert fast.moved > 0.25 and fast.warning == ""
    assert slow.objective > fast.objective


def test_a_search_by_class_gives_all_records_of_its_classes(blobs, trained, digits_task):
    spy = SpyOnWeights()
    found = worst_case(trained, blobs, digits_task, lower=spy, by="class", steps=2, upper_lr=0.3)
    labels = blobs.column("label")
    assert len(found.classes) == 1  # a tenth of three classes, at least one
    assert set(found.ids) == {
        i for i, label in zip(blobs.ids, labels, strict=True) if label == found.classes[0]
    }
    for weights, *_ in spy.asked:
        assert all(len(set(weights[labels == label])) == 1 for label in range(3))
    assert set(found.weights) == {"0", "1", "2"} and sum(found.weights.values()) == pytest.approx(1)


def test_the_published_class_loss_is_another_one(blobs, trained, digits_task):
    runtime = pal.Runtime(device="cpu", batch_size=7)
    means, released = (
        worst_case(trained, blobs, digits_task, 1, by="class", steps=1, upper_lr=0.1, class_loss=name, runtime=runtime)
        for name in ("mean", "released")
    )  # fmt: skip
    assert means.weights != released.weights


# What the lower level is asked


def test_every_upper_step_starts_from_the_original_model_with_another_seed(blobs, trained, digits_task):
    spy = SpyOnWeights()
    before = fingerprint(trained)
    worst_case(trained, blobs, digits_task, 6, lower=spy, steps=4, upper_lr=0.5)
    assert {model for _, model, _ in spy.asked} == {before} and fingerprint(trained) == before
    assert len({seed for *_, seed in spy.asked}) == 4


def test_the_first_weights_mark_a_random_set_of_the_size(blobs, trained, digits_task):
    spies = [SpyOnWeights(), SpyOnWeights(), SpyOnWeights()]
    for spy, seed in zip(spies, (0, 0, 1), strict=True):
        worst_case(trained, blobs, digits_task, 6, lower=spy, steps=1, seed=seed)
    first = [spy.asked[0][0] for spy in spies]
    assert all(set(w) == {0.0, 1.0} and w.sum() == 6 for w in first)
    assert (first[0] == first[1]).all() and (first[0] != first[2]).any()


def test_a_method_without_weights_gets_the_top_set_of_a_step_as_a_request(blobs, trained, digits_task):
    spy = SpyOnSets()
    found = worst_case(trained, blobs, digits_task, 6, lower=spy, steps=2, upper_lr=10.0)
    tensors = tensors_of(blobs)
    with torch.no_grad():
        losses = (
            F.cross_entropy(trained(tensors["input"]), tensors["label"], reduction="none").double().numpy()
        )
    # the spy changes nothing, so every step sees the losses of the original model
    assert all(len(forget) == 6 and forget | retain == set(blobs.ids) for forget, retain, *_ in spy.asked)
    start = np.array([identifier in spy.asked[0][0] for identifier in blobs.ids], float)
    moved = start - 10 * (losses + 2e-4 * start)
    expected = {blobs.ids[i] for i in np.argsort(-moved, kind="stable")[:6]}
    assert spy.asked[1][0] == expected
    assert "does not move by signs" in found.caution and found.settings["weighted"] is False


def test_weights_become_binary_every_so_many_steps_but_the_result_is_continuous(blobs, trained, digits_task):
    spy = SpyOnWeights()
    found = worst_case(trained, blobs, digits_task, 6, lower=spy, steps=4, upper_lr=0.3, binarise_every=2)
    binary = [set(np.unique(weights)) <= {0.0, 1.0} for weights, *_ in spy.asked]
    assert binary == [True, False, True, False]
    assert found.non_binary > 0
    best = sorted(blobs.ids, key=lambda identifier: -found.weights[identifier])[:6]
    assert set(best) == set(found.ids)


def test_a_search_can_start_from_given_weights(blobs, trained, digits_task):
    spy, start = SpyOnWeights(), [0.1] * 60
    worst_case(trained, blobs, digits_task, 6, lower=spy, steps=1, start=start)
    assert spy.asked[0][0].tolist() == start


def test_history_tells_objective_share_of_non_binary_weights_and_movement(blobs, trained, digits_task):
    spy = SpyOnWeights()
    found = worst_case(trained, blobs, digits_task, 6, lower=spy, steps=2, upper_lr=0.2, gamma=0.1)
    model = build_model("mlp", (6,), 3, seed=spy.asked[1][2] % 1000, width=8)
    losses = record_losses(model, blobs, digits_task, pal.Runtime(device="cpu"))
    w = np.array([found.weights[identifier] for identifier in blobs.ids])
    last = found.history[-1]
    assert last["objective"] == pytest.approx(w @ losses) and last["penalty"] == pytest.approx(0.1 * w @ w)
    chosen = np.isin(blobs.ids, found.ids)
    assert last["set_loss"] == pytest.approx(losses[chosen].mean())
    assert last["non_binary"] == ((w > 1e-6) & (w < 1 - 1e-6)).mean()
    assert last["moved"] == 1 - (chosen & (spy.asked[0][0] == 1)).sum() / 6
    assert [step["step"] for step in found.history] == [1, 2]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_losses_are_recorded_in_the_mode_that_is_asked_for(digits_task, mode):
    model = build_model("small_resnet", (1, 8, 8), 3, seed=0, width=4)
    records = pal.Records(TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9) % 3))
    chosen = records.select([8, 3, 5, 0, 1, 2, 4, 6, 7])
    found = record_losses(model, chosen, digits_task, pal.Runtime(device="cpu", batch_size=8), mode)
    tensors = tensors_of(chosen)
    model.train(mode == "train")
    with torch.no_grad():  # nine records: the ninth alone has no batch statistics, so they are one batch
        truth = F.cross_entropy(model(tensors["input"]), tensors["label"], reduction="none")
    np.testing.assert_allclose(found, truth.numpy(), rtol=1e-4)
    assert model.training == (mode == "train")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_large_vision_models_are_searched_and_left_as_they_were(name, digits_task):
    settings = {"img_size": 32} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 4, seed=0, **settings).train()
    records = pal.Records(TensorDataset(torch.rand(9, 3, 32, 32), torch.arange(9) % 4))
    before = fingerprint(model)
    found = worst_case(model, records, digits_task, 3, steps=1, record_mode="train")
    assert len(found.ids) == 3 and fingerprint(model) == before and model.training


# Files


def test_an_interrupted_search_goes_on_from_its_last_step_to_the_same_end(
    blobs, trained, digits_task, tmp_path
):
    shared = {"steps": 5, "upper_lr": 0.4, "binarise_every": 2, "size": 7, "by": "record"}
    size = shared.pop("size")
    whole = worst_case(trained, blobs, digits_task, size, SpyOnWeights(), **shared)
    out, stopped, again = tmp_path / "worst.json", SpyOnWeights(stop_after=3), SpyOnWeights()
    with pytest.raises(KeyboardInterrupt):
        worst_case(trained, blobs, digits_task, size, stopped, out=out, **shared)
    assert not out.exists() and (tmp_path / "worst.json.part").exists()
    resumed = worst_case(trained, blobs, digits_task, size, again, out=out, **shared)
    assert len(again.asked) == 2
    assert resumed == whole
    assert [path.name for path in tmp_path.iterdir()] == ["worst.json"]
    assert WorstCase.load(out) == json_round_trip(whole)


def json_round_trip(found):
    """As JSON gives it back."""
    stored = json.loads(json.dumps(found.to_dict()))
    return WorstCase(
        tuple(stored["ids"]), tuple(stored["classes"]), stored["scores"], stored["settings"],
        stored["fingerprint"], tuple(stored["history"]),
    )  # fmt: skip


def test_a_finished_search_is_read_and_extended_never_repeated(blobs, trained, digits_task, tmp_path):
    out, shared = tmp_path / "worst.json", {"upper_lr": 0.4}
    first = worst_case(trained, blobs, digits_task, 7, SpyOnWeights(), out=out, steps=2, **shared)
    written = out.stat().st_mtime_ns
    idle, further = SpyOnWeights(), SpyOnWeights()
    assert worst_case(trained, blobs, digits_task, 7, idle, out=out, steps=2, **shared) == first
    assert idle.asked == [] and out.stat().st_mtime_ns == written
    more = worst_case(trained, blobs, digits_task, 7, further, out=out, steps=4, **shared)
    assert len(further.asked) == 2
    fresh = worst_case(trained, blobs, digits_task, 7, SpyOnWeights(), steps=4, **shared)
    assert more.weights == fresh.weights and more.history == fresh.history and more.ids == fresh.ids


@pytest.mark.parametrize(
    "change", [{"size": 8}, {"upper_lr": 0.5}, {"seed": 1}, {"goal": "easiest"}, {"gamma": 0.0}, {"steps": 1}]
)
def test_the_file_of_another_search_is_left_alone(blobs, trained, digits_task, tmp_path, change):
    out, said = tmp_path / "worst.json", {"size": 7, "upper_lr": 0.4, "steps": 2}
    worst_case(trained, blobs, digits_task, lower=SpyOnWeights(), out=out, **said)
    before = out.read_bytes()
    spy = SpyOnWeights()
    with pytest.raises(InvalidRecipe, match="Remove it, or choose another file"):
        worst_case(trained, blobs, digits_task, lower=spy, out=out, **{**said, **change})
    assert spy.asked == [] and out.read_bytes() == before


def test_another_model_or_other_data_are_another_search(blobs, trained, digits_task, tmp_path):
    out, said = tmp_path / "worst.json", {"size": 7, "steps": 1, "out": tmp_path / "worst.json"}
    worst_case(trained, blobs, digits_task, **said)
    other = build_model("mlp", (6,), 3, seed=1, width=16)
    for model, records in ((other, blobs), (trained, blobs.select(range(50)))):
        with pytest.raises(InvalidRecipe, match="holds another search"):
            worst_case(model, records, digits_task, **said)
    assert out.exists()


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"ids": ["a"]}'])
def test_a_file_that_holds_something_else_is_not_overwritten(blobs, trained, digits_task, tmp_path, text):
    out = tmp_path / "worst.json"
    out.write_text(text)
    with pytest.raises(InvalidRecipe, match=r"worst\.json"):
        worst_case(trained, blobs, digits_task, 7, out=out)
    assert out.read_text() == text
    with pytest.raises(InvalidRecipe):
        WorstCase.load(out)


def test_a_place_that_cannot_be_written_is_named_before_the_search(blobs, trained, digits_task, tmp_path):
    (tmp_path / "file").write_text("")
    spy = SpyOnWeights()
    with pytest.raises(CannotWrite):
        worst_case(trained, blobs, digits_task, 7, spy, out=tmp_path / "file" / "worst.json")
    with pytest.raises(InvalidRecipe, match="is a folder"):
        worst_case(trained, blobs, digits_task, 7, spy, out=tmp_path)
    assert spy.asked == []


# Bad input


@pytest.mark.parametrize("size", [0, -3, 60, 61, 1.0, 6.5, 0.0, -0.1, True, "6", None, 0.001, float("nan")])
def test_sizes_that_are_no_number_of_records_are_refused(blobs, trained, digits_task, size):
    spy = SpyOnWeights()
    with pytest.raises(InvalidHyperparameter, match="size"):
        worst_case(trained, blobs, digits_task, size, spy)
    assert spy.asked == []


@pytest.mark.parametrize("size", [0, 3, 4, 2.0])
def test_sizes_that_are_no_number_of_classes_are_refused(blobs, trained, digits_task, size):
    with pytest.raises(InvalidHyperparameter, match="classes"):
        worst_case(trained, blobs, digits_task, size, by="class")


def test_a_share_is_rounded_to_a_number(blobs, trained, digits_task):
    found = worst_case(trained, blobs, digits_task, 0.12, SpyOnWeights(), steps=1)
    assert len(found.ids) == 7 and found.settings["size"] == 7


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ([0.1] * 59, "60 weights"),
        ([1.2] + [0.0] * 59, r"\[0, 1\]"),
        ([0.5] * 60, "sum to 30, not to size = 6"),
    ],
)
def test_weights_to_start_from_that_do_not_fit_are_refused(blobs, trained, digits_task, start, said):
    spy = SpyOnWeights()
    with pytest.raises(InvalidHyperparameter, match=said):
        worst_case(trained, blobs, digits_task, 6, spy, start=start)
    assert spy.asked == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"goal": "worst"}, {"by": "prompt"}, {"steps": 0}, {"steps": 2.5}, {"upper_lr": 0}, {"upper_lr": -1.0},
        {"gamma": -1e-4}, {"binarise_every": 0}, {"record_mode": "both"}, {"class_loss": "sum"}, {"tolerance": 0.0},
        {"upper_lr": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidHyperparameter, match=next(iter(wrong))):
        Search(**wrong)


def test_records_and_models_that_cannot_be_used_are_refused_before_any_work(blobs, trained, digits_task):
    spy = SpyOnWeights()
    with pytest.raises(DuplicateIds, match="p4"):
        worst_case(trained, blobs.select([4, 1, 2, 4]), digits_task, 2, spy)
    with pytest.raises(InvalidRecords, match="at least 2"):
        worst_case(trained, blobs.select([4]), digits_task, 1, spy)
    broken = build_model("mlp", (6,), 3, seed=0, width=16)
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    with pytest.raises(NonFinite):
        worst_case(broken, blobs, digits_task, 6, spy)
    unlabelled = pal.Records([{"input": torch.zeros(6)} for _ in range(9)])
    with pytest.raises(InvalidLabels):
        worst_case(trained, unlabelled, digits_task, 2, spy)
    with pytest.raises(InvalidLabels, match="by class"):
        worst_case(trained, unlabelled, digits_task, 2, spy, by="class")
    with pytest.raises(UnknownName, match="sign-finetune"):
        worst_case(trained, blobs, digits_task, 6, "sign-finetun")
    with pytest.raises(UnknownName, match="epochs"):
        worst_case(trained, blobs, digits_task, 6, lower_settings={"epoch": 2})
    elsewhere = SpyOnSets()
    object.__setattr__(elsewhere, "card", Card("elsewhere", "", NEEDS, ("language",), None))
    with pytest.raises(ModelMismatch, match="works for language, not for classification"):
        worst_case(trained, blobs, digits_task, 6, elsewhere)
    untaught = build_model("mlp", (6,), 3, seed=0, width=16)
    with pytest.raises(MissingNeed, match="training-recipe"):
        worst_case(untaught, blobs, digits_task, 6, "retrain")
    assert spy.asked == []


def test_a_collate_without_positions_is_refused_before_any_work(trained):
    class Forgetful(pal.tasks.Classification):
        def collate(self, items):
            batch = super().collate(items)
            del batch["index"]
            return batch

    records = pal.Records(
        [(torch.rand(6), i % 3) for i in range(9)], columns={"label": [i % 3 for i in range(9)]}
    )
    spy = SpyOnWeights()
    with pytest.raises(InvalidRecords, match="index"):
        worst_case(trained, records, Forgetful(), 2, spy)
    assert spy.asked == []


def test_losses_that_are_no_numbers_stop_the_search_and_name_records(blobs, trained, digits_task):
    class Diverging(SpyOnSets):
        def unlearn(self, model, split, task, runtime):
            broken = build_model("mlp", (6,), 3, seed=0, width=16)
            with torch.no_grad():
                broken.head.bias.copy_(
                    torch.tensor([3e38, -3e38, 0.0])
                )  # finite, but their difference is not
            return broken

    with pytest.raises(NonFiniteLoss, match="on records"):
        worst_case(trained, blobs, digits_task, 6, Diverging(), steps=1)
