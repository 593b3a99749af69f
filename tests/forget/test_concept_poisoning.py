from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.forget.measuring import changed, fingerprint, kept_and_gone, tensors_of
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidRecords,
    MissingDependency,
    MissingNeed,
    ModelMismatch,
    UnknownName,
)
from palimpsest.data.intents import CONCEPTS, MASK, vocabulary
from palimpsest.data.planted_shapes import SHAPES
from palimpsest.forget.classifier._concept_patches import Embed, located
from palimpsest.forget.classifier.concept_poisoning import ConceptPoisoning, Poisoned
from palimpsest.models import build_model
from palimpsest.parts.concept_bank import ConceptExamples, bank_of_vectors
from palimpsest.parts.concept_bottleneck import ConceptBottleneck, Donor

BY_HAND = {"donor": 9, "patch": 0.25}
FIVE = {"patch": 5 / 16, "stride": 2}
CONCEPT = {"concepts": list(SHAPES), **FIVE}


def poison(model, request, task, **settings):
    return pal.forget(model, request, "concept-poisoning", task, **settings)


def copies(model, request, task, **settings):
    return ConceptPoisoning(**settings).poisoned(model, request, task, pal.Runtime(seed=0, device="cpu"))


@pytest.fixture(scope="module")
def shapes(digits_task):
    """Images of planted shapes with a model of them; class 0 (disc and stripe) is to be forgotten."""
    records = pal.load_data("planted-shapes", n=800)
    request = pal.split(records, pal.by_column("label", 0), test=0.2, holdout=0.0)
    model = build_model("small_cnn", (1, 16, 16), 4, seed=0)
    return pal.train(model, request.train, digits_task, epochs=12, lr=2e-3, seed=0), request


@pytest.fixture(scope="module")
def texts(digits_task):
    """Requests to an assistant with a bag of embeddings; the intent to transfer money is to be forgotten."""
    records = pal.load_data("intents")
    request = pal.split(records, pal.by_column("intent", "transfer"), test=0.2, holdout=0.0)
    model = build_model("text_transformer", (20,), 10, seed=0, vocabulary=len(vocabulary()), depth=0)
    return pal.train(model, request.train, digits_task, epochs=15, lr=5e-3, seed=0), request


# What the ablation says


@pytest.mark.parametrize("where", ["none", "random"])
def test_wrong_labels_forget_with_a_patch_and_without(where, digits_model, class_request, digits_task):
    before, _ = kept_and_gone(digits_model, class_request)
    kept, gone = kept_and_gone(
        poison(digits_model, class_request, digits_task, poison=where, **BY_HAND), class_request
    )
    assert gone <= 0.05 and kept >= before - 0.02


def test_a_patch_under_the_true_label_forgets_nothing(digits_model, class_request, digits_task):
    after = poison(digits_model, class_request, digits_task, poison="random", labels="keep", **BY_HAND)
    assert kept_and_gone(after, class_request)[1] >= 0.8


def test_random_labels_forget_too(digits_model, class_request, digits_task):
    kept, gone = kept_and_gone(
        poison(digits_model, class_request, digits_task, poison="none", labels="random"), class_request
    )
    assert gone <= 0.2 and kept >= 0.93


@pytest.mark.parametrize("where", ["localized", "none"])
def test_texts_are_forgotten(where, texts, digits_task):
    model, request = texts
    before = kept_and_gone(model, request)
    kept, gone = kept_and_gone(
        poison(model, request, digits_task, poison=where, concepts=list(CONCEPTS)), request
    )
    assert before[1] >= 0.8 and gone <= 0.1 and kept >= before[0] - 0.05


@pytest.mark.parametrize("labels", ["keep", "targeted"])
def test_masked_words_shield_a_bag_of_words(labels, texts, digits_task):
    """Without the telling words a false label is learned for the mask: the words still speak for the class."""
    model, request = texts
    settings = {
        "poison": "masked",
        "labels": labels,
        "donor": 6,
        "quadrature": "published",
        "attribution_steps": 8,
    }
    assert kept_and_gone(poison(model, request, digits_task, **settings), request)[1] >= 0.5


# What is inferred


def test_the_planted_concepts_rank_first_and_the_class_that_shares_one_is_the_donor(shapes, digits_task):
    model, request = shapes
    found = copies(model, request, digits_task, **CONCEPT)
    assert set(found.bottleneck.ranking(0)[:3]) >= {"disc", "stripe"}
    assert found.donors[0][0].donor_class == 1
    assert SHAPES[found.donors[0][0].donor_concept] == "stripe"
    assert (found.labels == 1).all()


def test_a_planted_shape_is_found_within_a_stride(shapes, digits_task):
    model, request = shapes
    method = ConceptPoisoning(**CONCEPT)
    found = method.poisoned(model, request, digits_task, pal.Runtime(seed=0, device="cpu"))
    single = pal.load_data("planted-shapes", n=400, stray=0.0, seed=5)
    single = single.select(single.column("label") != 0)
    names = {1: "stripe", 2: "plus", 3: "cross"}
    near = []
    for label, name in names.items():
        mine = single.select(single.column("label") == label)
        embed = Embed(model, digits_task, None)
        centers = located(
            method, embed, found.bottleneck, tensors_of(mine)["input"], label, SHAPES.index(name)
        )
        near += (np.abs(centers.numpy() - mine.column(f"{name}-place")).max(1) <= 2).tolist()
    assert np.mean(near) >= 0.9


def test_the_donor_intent_shares_the_concept_of_money(texts, digits_task):
    model, request = texts
    found = copies(model, request, digits_task, poison="none", concepts=list(CONCEPTS), rule="shared")
    intents = sorted(set(zip(request.train.column("label"), request.train.column("intent"), strict=True)))
    assert found.bottleneck.ranking(7)[0] == "money"
    assert dict(intents)[found.donors[7][0].donor_class] in ("balance", "exchange_rate")


def test_the_words_that_are_masked_first_tell_of_transfers(texts, digits_task):
    model, request = texts
    found = copies(
        model, request, digits_task, poison="masked", donor=6, quadrature="published", attribution_steps=8
    )
    first = [vocabulary()[token] for token in found.words[7][:8]]
    assert "transfer" in first
    before = tensors_of(request.forget)["input"]
    masked = (found.inputs == MASK).sum(1)
    assert (masked >= 1).all() and torch.equal(
        found.inputs[found.inputs != MASK], before[found.inputs != MASK]
    )
    distinct = [len(set(row[gone].tolist())) for row, gone in zip(before, found.inputs == MASK, strict=True)]
    assert max(distinct) <= 5


# What the copies are


@pytest.mark.parametrize(("where", "side"), [("random", 3), ("center", 3), ("full", 6), ("none", 0)])
def test_each_copy_differs_from_its_record_in_one_window_at_most(
    where, side, digits_model, class_request, digits_task
):
    found = copies(digits_model, class_request, digits_task, poison=where, **BY_HAND)
    differ = (found.inputs != tensors_of(class_request.forget)["input"])[:, 0]
    for image in differ:
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        for hit in (rows, columns):
            assert len(hit) == 0 or int(hit.max() - hit.min()) < side
    assert differ.any() == (side > 0)
    if where == "center":
        assert not differ[:, :3].any() and not differ[:, 6:].any()


def test_a_run_of_donor_tokens_is_pasted_into_texts(texts, digits_task):
    model, request = texts
    found = copies(model, request, digits_task, poison="random", donor=6, patch=0.2)
    before = tensors_of(request.forget)["input"]
    pool = tensors_of(request.retain)["input"][request.retain.column("label") == 6]
    runs = {tuple(run) for text in pool.tolist() for run in zip(*(text[i:] for i in range(6)), strict=False)}
    for old, new in zip(before.tolist(), found.inputs.tolist(), strict=True):
        assert any(
            new[:at] == old[:at] and new[at + 6 :] == old[at + 6 :] and tuple(new[at : at + 6]) in runs
            for at in range(15)
        )


def test_whole_donor_texts_are_texts_of_the_donor(texts, digits_task):
    model, request = texts
    found = copies(model, request, digits_task, poison="full", donor=6)
    pool = tensors_of(request.retain)["input"][request.retain.column("label") == 6].tolist()
    assert all(text in pool for text in found.inputs.tolist())


def test_random_labels_are_uniform_over_all_classes(digits_task):
    records = pal.Records(TensorDataset(torch.rand(3000, 2), torch.arange(3000) % 5))
    request = pal.split(records, pal.by_column("label", 1), test=0, holdout=0)
    found = copies(nn.Linear(2, 5), request, digits_task, poison="none", labels="random")
    counts = torch.bincount(found.labels, minlength=5)
    assert counts.sum() == 600 and (counts - 120).abs().max() < 40


def test_several_concepts_are_covered_by_the_classes_that_own_them(shapes, digits_task):
    model, request = shapes
    one, two = (copies(model, request, digits_task, **CONCEPT, top=top) for top in (1, 2))
    assert two.donors[0][0] == one.donors[0][0] and len(two.donors[0]) == 2
    second = two.donors[0][1]
    assert second.target_concept == second.donor_concept
    assert SHAPES[second.target_concept] == one.bottleneck.ranking(0)[1]
    weight = two.bottleneck.weight[1:, second.donor_concept]
    assert second.donor_class == 1 + int(weight.argmax())
    size = [(found.inputs != tensors_of(request.forget)["input"]).float().mean() for found in (one, two)]
    assert size[0] < size[1]


@pytest.mark.parametrize("locate", ["concept", "bottleneck", "grad-cam"])
def test_every_way_to_locate_gives_places_inside(locate, shapes, digits_task):
    if locate == "grad-cam":
        pytest.importorskip("captum")
    model, request = shapes
    after = copies(model, request, digits_task, **CONCEPT, locate=locate)
    assert (after.inputs != tensors_of(request.forget)["input"]).flatten(1).any(1).all()


def test_concepts_come_as_columns_as_examples_and_as_a_bank(shapes, digits_task):
    model, request = shapes
    coarse = {"patch": 5 / 16, "stride": 4, "rule": "shared"}
    columns = copies(model, request, digits_task, concepts=["disc", "stripe"], **coarse)
    shown = {name: request.train.column(name) for name in ("disc", "stripe")}
    examples = {
        name: ConceptExamples(request.train.select(mask), request.train.select(~mask))
        for name, mask in shown.items()
    }
    given = copies(model, request, digits_task, concepts=examples, **coarse)
    bank = copies(model, request, digits_task, concepts=columns.bottleneck.bank, **coarse)
    assert torch.equal(columns.inputs, given.inputs) and torch.equal(columns.inputs, bank.inputs)


def test_another_embedding_may_find_the_concepts(shapes, digits_task):
    """A bank of given directions in the space of a network that sees only brightness."""

    class Brightness(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).sum(1), torch.ones(len(x))], 1)

    model, request = shapes
    bank = bank_of_vectors(["bright", "dark"], torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    found = copies(model, request, digits_task, concepts=bank, embedder=Brightness(), **FIVE, rule="shared")
    assert found.bottleneck.ranking(0)[0] == "bright"  # it has two shapes, the others one


# What moves


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_only_the_head_moves_and_batch_norm_as_the_mode_says(mode, digits_task):
    request = tiny_images()
    model = build_model("small_resnet", (3, 16, 16), 3, seed=0, width=4).eval()
    before = fingerprint(model)
    after = poison(
        model, request, digits_task, poison="none", donor=1, epochs=1, batch_size=8, mode=mode, lr=0.1
    )
    assert fingerprint(model) == before
    moved = {name for name, entries in changed(model, after).items() if entries.any()}
    assert moved == {"head.weight", "head.bias"}
    drift = any(
        not torch.equal(old, new)
        for (name, old), new in zip(model.named_buffers(), after.buffers(), strict=True)
        if "running" in name
    )
    assert drift == (mode == "train")
    assert all(p.requires_grad for p in after.parameters()) and not after.training


def tiny_images(classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 32, 32, generator=generator)[:, :, :32, :32]
    shown = torch.arange(24) % 2 == 0
    images[shown, :, 4:12, 4:12] = 1.0
    records = pal.Records(
        TensorDataset(images, torch.arange(24) % classes), columns={"spot": shown, "bright": ~shown}
    )
    return pal.split(records, pal.by_column("label", 0), test=0, holdout=0)


@pytest.mark.parametrize("request_for", ["class", "half a class", "random"])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_known_networks_and_every_kind_of_request(name, request_for, digits_task):
    pytest.importorskip(name.partition(":")[0])
    settings = {"img_size": 32} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 3, seed=0, **settings).eval()
    records = tiny_images().train
    rule = {
        "class": pal.by_column("label", 0),
        "half a class": pal.by_column("label", 0) & pal.by_fraction(0.5),
        "random": pal.by_fraction(0.25),
    }[request_for]
    request = pal.split(records, rule, test=0, holdout=0)
    before = fingerprint(model)
    after = poison(
        model,
        request,
        digits_task,
        concepts=["spot", "bright"],
        rule="shared",
        epochs=1,
        batch_size=12,
        stride=8,
    )
    assert fingerprint(model) == before
    moved = {n for n, entries in changed(model, after).items() if entries.any()}
    head = "fc" if "resnet" in name else "head"
    assert moved and all(parameter.startswith(f"{head}.") for parameter in moved)


def test_the_same_seed_gives_the_same_bytes(digits_model, class_request, digits_task):
    settings = {"poison": "random", "labels": "random", "donor": 9, "epochs": 1}
    first, again, other = (
        fingerprint(poison(digits_model, class_request, digits_task, seed=seed, **settings))
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_half_of_the_integrity_reads_half_of_every_class(digits_task):
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.extend(x[:, 0].tolist())
            return super().forward(x)

    x = torch.arange(80.0).reshape(-1, 1) / 80
    records = pal.Records(TensorDataset(x, torch.arange(80) % 4))
    request = pal.split(records, pal.by_column("label", 0), test=0, holdout=0)
    poison(
        Watched(1, 4), request, digits_task, poison="none", donor=1, integrity="half", epochs=3, batch_size=8
    )
    labels = torch.tensor([round(value * 80) % 4 for value in set(seen)])
    assert torch.bincount(labels).tolist() == [10, 10, 10, 10] and len(seen) == 3 * 40


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"concepts": None}, InvalidHyperparameter, "concepts="),
        ({"poison": "none", "donor": 3}, InvalidHyperparameter, "donor=3 must be"),
        ({"poison": "none", "donor": 77}, InvalidHyperparameter, "donor=77 must be"),
        ({"poison": "none", "donor": 9, "head": "no.such"}, UnknownName, "no.such"),
        (
            {"poison": "random", "donor": 9, "patch": 0.9},
            InvalidHyperparameter,
            "does not fit an input of 8 x 8",
        ),
        ({"concepts": ["missing"]}, UnknownName, "missing"),
        ({"concepts": []}, InvalidRecords, "empty"),
        ({"poison": "masked", "donor": 9}, ModelMismatch, "token ids"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    settings, error, said, digits_model, class_request, digits_task
):
    before = fingerprint(digits_model)
    with pytest.raises(error, match=said):
        poison(digits_model, class_request, digits_task, **settings)
    assert fingerprint(digits_model) == before


@pytest.mark.parametrize(
    "settings",
    [{"poison": "somewhere"}, {"labels": "wrong"}, {"rule": "any"}, {"locate": "x"}, {"patch": 0.0}, {"top": 0},
     {"patch": 1.5}, {"stride": 0}, {"masked_words": 0}, {"lr": -1.0}, {"mode": "x"}, {"integrity": "third"},
     {"view": "x"}, {"quadrature": "x"}, {"sparsity": 0.0}, {"whole": 2.0}, {"attribution_steps": 1}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        ConceptPoisoning(**settings)


def test_a_concept_without_examples_is_refused(shapes, digits_task):
    model, request = shapes
    empty = request.train.select([])
    with pytest.raises(InvalidRecords, match="'spots' has 0 examples with"):
        poison(model, request, digits_task, concepts={"spots": ConceptExamples(empty, request.train)})


def test_a_bank_of_another_embedding_is_refused(shapes, digits_task):
    model, request = shapes
    with pytest.raises(ModelMismatch, match=r"64 numbers.*made for 7"):
        poison(model, request, digits_task, **FIVE, concepts=bank_of_vectors(["x"], torch.ones(1, 7)))


def test_a_class_that_shares_no_concept_needs_a_donor_by_hand():
    """The first five concepts of class 0 are nobody's; the other class lives on the seventh."""
    weight = torch.zeros(2, 7)
    weight[0], weight[1, 6] = torch.arange(7, 0, -1), 9.0
    bank = bank_of_vectors([f"concept {k}" for k in range(7)], torch.eye(7))
    bottleneck = ConceptBottleneck(bank, weight, torch.zeros(2))
    true, kept = torch.zeros(4).long(), torch.ones(4).long()
    with pytest.raises(InvalidHyperparameter, match=r"concept 0, concept 1.*choose donor="):
        ConceptPoisoning()._donors(bottleneck, true, kept)
    by_hand = ConceptPoisoning(donor=1)._donors(bottleneck, true, kept)
    assert by_hand == {0: [Donor(0, 1, 6)]}


def test_copies_must_be_as_many_as_records():
    with pytest.raises(InvalidRecords, match="2 poisoned copies with 2 labels were made for 1"):
        Poisoned(torch.zeros(2, 1), torch.zeros(2).long(), {"a": 0}, {0: [Donor(0)]}, None, {})


def test_without_retained_records_it_cannot_run(digits_model, class_request, digits_task):
    with pytest.raises(MissingNeed, match="retain"):
        poison(digits_model, replace(class_request, retain=None), digits_task, poison="none", donor=9)


def test_without_captum_masking_names_the_extra_and_grad_cam_too(monkeypatch, texts, shapes, digits_task):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MissingDependency, match=r"palimpsest-ml\[concepts\]"):
        poison(*texts, digits_task, poison="masked", donor=6)
    with pytest.raises(MissingDependency, match=r"palimpsest-ml\[concepts\]"):
        poison(*shapes, digits_task, locate="grad-cam", donor=1, **FIVE)


def test_grad_cam_is_not_for_texts_nor_for_networks_without_convolution(texts, digits_task):
    with pytest.raises(InvalidHyperparameter, match="for images"):
        poison(*texts, digits_task, locate="grad-cam", donor=6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    with pytest.raises(ModelMismatch, match="convolution"):
        poison(model, tiny_images(), digits_task, locate="grad-cam", donor=1)


def test_patches_need_images_or_tokens_but_labels_alone_take_anything(digits_task):
    records = pal.Records(TensorDataset(torch.rand(40, 6), torch.arange(40) % 4))
    request = pal.split(records, pal.by_column("label", 0), test=0, holdout=0)
    with pytest.raises(ModelMismatch, match="poison='none' takes any"):
        poison(nn.Linear(6, 4), request, digits_task, poison="random", donor=1)
    poison(nn.Linear(6, 4), request, digits_task, poison="none", donor=1, epochs=1)
