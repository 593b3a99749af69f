from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidLabels, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.parts.concept_bank import (
    ConceptBank,
    ConceptExamples,
    bank_of_vectors,
    concept_activation_vector,
    examples_by_column,
    learn_concept_bank,
)
from palimpsest.parts.concept_bottleneck import choose_donor, fit_concept_bottleneck

RUNTIME = pal.Runtime(seed=0, device="cpu")


def vectors_of(records):
    return records.tensors["input"]


def records_of(x, **columns):
    return pal.Records(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), columns=columns)


@pytest.fixture
def planted():
    """Embeddings in which each concept adds 4 to its own axis of five."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(300, 3, generator=generator) < 0.5
    x = torch.randn(300, 5, generator=generator)
    x[:, :3] += 4 * shown
    names = ("a", "b", "c")
    return records_of(x, **{name: shown[:, k].numpy() for k, name in enumerate(names)}), shown


# The bank


def test_learned_vectors_point_along_the_planted_axes(planted):
    records, shown = planted
    bank = learn_concept_bank(examples_by_column(records, ["a", "b", "c"]), vectors_of, RUNTIME)
    assert bank.names == ("a", "b", "c")
    cosines = bank.directions[:, :3]
    assert (cosines.diagonal() > 0.9).all()
    assert ((bank.margins(vectors_of(records).double()) > 0) == shown).double().mean() > 0.95


def test_a_margin_is_the_signed_distance_to_the_hyperplane_between_the_examples():
    positive, negative = torch.tensor([[3.0, 1], [3.0, 2]]), torch.tensor([[1.0, 1], [1.0, 2]])
    vector, intercept = concept_activation_vector(positive, negative)
    bank = ConceptBank(("right",), vector[None], intercept[None], vector.norm()[None])
    points = torch.tensor([[2.0, 5.0], [4.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(bank.margins(points)[:, 0], torch.tensor([0.0, 2, -3]).double())


def test_given_vectors_have_no_intercept_and_their_own_length():
    bank = bank_of_vectors(["x"], torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(
        bank.margins(torch.tensor([[3.0, 4.0], [4.0, -3.0]])), torch.tensor([[5.0], [0]])
    )


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_concept_without_examples_is_refused_by_name(planted, side):
    records, _ = planted
    none = {"positive": records, "negative": records, side: records.select([])}
    with pytest.raises(InvalidRecords, match=r"'spots' has .*0 (examples with|without)"):
        learn_concept_bank({"spots": ConceptExamples(**none)}, vectors_of, RUNTIME)


def test_an_empty_bank_is_refused():
    with pytest.raises(InvalidRecords, match="empty"):
        learn_concept_bank({}, vectors_of, RUNTIME)
    with pytest.raises(InvalidRecords, match="empty"):
        bank_of_vectors([], torch.zeros(0, 3))


@pytest.mark.parametrize("bad", [[0.0, 0.0], [float("nan"), 1.0]])
def test_a_vector_without_a_direction_is_refused(bad):
    with pytest.raises(InvalidRecords, match="'flat'"):
        bank_of_vectors(["round", "flat"], torch.tensor([[1.0, 0.0], bad]))


def test_examples_that_are_all_alike_are_refused():
    same = records_of(torch.ones(6, 3))
    with pytest.raises(InvalidRecords, match="do not tell it apart"):
        learn_concept_bank({"x": ConceptExamples(same, same)}, vectors_of, RUNTIME)


def test_names_that_come_twice_and_wrong_shapes_are_refused():
    with pytest.raises(InvalidRecords, match="unique"):
        bank_of_vectors(["x", "x"], torch.eye(2))
    with pytest.raises(InvalidRecords, match="as many"):
        ConceptBank(("x",), torch.eye(1), torch.zeros(2), torch.ones(1))
    with pytest.raises(InvalidRecords, match="as many"):
        ConceptBank(("x",), torch.eye(1), torch.zeros(1), torch.ones(2))


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ModelMismatch, match=r"3 numbers.*made for 2"):
        bank_of_vectors(["x"], torch.ones(1, 2)).margins(torch.ones(4, 3))


def test_unknown_concepts_and_columns_are_refused_with_a_suggestion(planted):
    with pytest.raises(UnknownName, match="'stripes'"):
        bank_of_vectors(["stripes"], torch.ones(1, 2)).index("stripe")
    with pytest.raises(UnknownName):
        examples_by_column(planted[0], ["d"])


# The bottleneck


def classes_of(shown):
    """Class 0 shows a, class 1 b, class 2 c alone; more than one is class 3."""
    return torch.where(shown.sum(1) == 1, shown.int().argmax(1), 3)


def test_a_class_lives_on_the_concept_that_it_was_made_of(planted):
    records, shown = planted
    labels = classes_of(shown)
    bank = learn_concept_bank(examples_by_column(records, ["a", "b", "c"]), vectors_of, RUNTIME)
    found = fit_concept_bottleneck(bank, vectors_of(records), labels, 4)
    assert [found.ranking(label)[0] for label in range(3)] == ["a", "b", "c"]


def test_the_hybrid_knows_what_no_concept_says():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 3, generator=generator)
    labels = (x[:, 0] > 0).long() * 2 + (x[:, 2] > 0).long()
    bank = bank_of_vectors(["first"], torch.tensor([[1.0, 0, 0]]))
    right = [
        (fit_concept_bottleneck(bank, x, labels, 4, hybrid=hybrid).logits(x.double()).argmax(1) == labels)
        .double()
        .mean()
        for hybrid in (False, True)
    ]
    assert right[0] < 0.7 and right[1] > 0.95


def test_classes_without_records_are_never_predicted(planted):
    records, shown = planted
    bank = learn_concept_bank(examples_by_column(records, ["a", "b"]), vectors_of, RUNTIME)
    labels = torch.where(shown[:, 0], 1, 4)  # two of six classes occur
    found = fit_concept_bottleneck(bank, vectors_of(records), labels, 6)
    predicted = found.logits(vectors_of(records).double()).argmax(1)
    assert set(predicted.tolist()) == {1, 4} and (predicted == labels).double().mean() > 0.9
    with pytest.raises(InvalidLabels, match="only"):
        fit_concept_bottleneck(bank, vectors_of(records), labels * 0, 6)


# Donors


def brute_force_donor(weight, target, topk):
    """The rule in words, once more, with plain loops."""
    for rank, concept in enumerate(np.argsort(-weight[target], kind="stable")[:topk]):
        rivals = {label: weight[label, concept] for label in range(len(weight)) if label != target}
        donor = max(rivals, key=rivals.get)
        if weight[donor].argmax() == concept:
            return donor, int(concept), rank
    return None, None, None


def test_the_confusion_rule_agrees_with_brute_force():
    random = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        weight = random.normal(size=(4, 6))
        for target in range(4):
            donor = choose_donor(torch.from_numpy(weight), target, topk=3)
            assert (donor.donor_class, donor.donor_concept, donor.donor_rank) == brute_force_donor(
                weight, target, 3
            )
            assert donor.target_concept == weight[target].argmax()
            found.add(donor.donor_rank)
    assert found == {None, 0, 1, 2}


def test_barred_classes_are_no_donors():
    weight = torch.tensor([[2.0, 1.0], [9.0, 0.0], [3.0, 0.0]])
    assert choose_donor(weight, 0).donor_class == 1
    assert choose_donor(weight, 0, barred=frozenset({1})).donor_class == 2
    assert choose_donor(weight, 0, "shared", barred=frozenset({1, 2})).donor_class is None
