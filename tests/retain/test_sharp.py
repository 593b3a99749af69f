from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidRecords,
    InvalidStream,
    ModelMismatch,
    NotTrained,
)
from palimpsest.models import build_model
from palimpsest.retain import Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.activation_memory import Quantised, ShortTerm, nearest_class
from palimpsest.retain.streams import from_parts
from palimpsest.retain.wiring import PLASTIC, cut, grown, share_of_activation, top_units

TRAINING = Training(epochs=4, lr=1.0, batch_size=24, optimizer="adadelta")


@pytest.fixture(scope="module")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


@pytest.fixture
def started(stream, cpu):
    def start(shape="small_cnn", **settings):
        extra = {"width": 8, "hidden": 64} if shape == "small_cnn" else {"width": 64}
        model = build_model(shape, (1, 8, 8), 6, seed=0, **extra)
        learner = build_learner("sharp", {"phases": 2, "horizon": 6, **settings})
        return Run(learner, stream, model, training=TRAINING, runtime=cpu())

    return start


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=12), st.floats(1, 100))
def test_top_units_are_the_fewest_that_reach_the_share(values, percent):
    activation = torch.tensor(values)
    picked = top_units(activation, percent)
    goal = percent / 100 * float(activation.double().sum())
    assert float(activation[picked].double().sum()) >= goal * (1 - 1e-6)
    assert float(activation[picked[:-1]].double().sum()) < goal + 1e-6 or len(picked) == 1
    rest = np.setdiff1d(np.arange(len(values)), picked.numpy())
    assert not len(rest) or float(activation[picked].min()) >= float(activation[rest].max())


def test_learners_get_fewer_from_phase_to_phase_down_to_the_least():
    shares = [share_of_activation(phase, 30, 60.0) for phase in range(1, 31)]
    assert shares[0] == shares[1] == pytest.approx(98.907, abs=1e-3)
    assert shares == sorted(shares, reverse=True) and shares[-1] == 60.0


def test_connections_from_plastic_units_to_others_are_cut_block_by_block():
    source, target = torch.tensor([0, 1]), torch.tensor([0, 2])
    mask = torch.tensor([[True] * 6, [True, False, True, True, True, False]])
    assert cut(source, target, mask).int().tolist() == [[0] * 6, [1, 0, 1, 0, 0, 0]]


@given(st.integers(0, 2**31), st.integers(0, 40))
def test_new_connections_are_absent_ones_to_plastic_units(seed, count):
    random = torch.Generator().manual_seed(seed)
    mask, target = torch.rand(6, 5, generator=random) < 0.5, torch.tensor([0, 1, 0, 3, 0, 1])
    new = grown(target, mask, count, random)
    free = ~mask & (target == 0)[:, None]
    assert not (new & ~free).any()
    assert int(new.sum()) == min(count, int(free.sum()))


def test_neighbours_agree_with_scikit_learn_where_all_units_count():
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.rand(30, 8, generator=random), torch.rand(50, 8, generator=random)
    labels = torch.arange(3).repeat_interleave(10)
    known = KNeighborsClassifier(5).fit(F.normalize(bank, dim=1).numpy(), labels.numpy())
    whole = torch.ones(8, dtype=torch.bool)
    found = nearest_class(queries, bank.split(10), [whole] * 3, [0, 1, 2], 5)
    assert found.tolist() == known.predict(F.normalize(queries, dim=1).numpy()).tolist()


def test_a_class_is_compared_on_its_own_units_and_only_if_allowed():
    banks = [torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[0.8, 0.6, 0.0]])]
    masks = [torch.tensor([True, True, False]), torch.tensor([True, True, True])]
    query = torch.tensor([[1.0, 0.0, 0.1]])
    assert nearest_class(query, banks, masks, [4, 7], 1).tolist() == [4]
    assert nearest_class(query, banks, [masks[1]] * 2, [4, 7], 1).tolist() == [7]  # without its mask
    assert nearest_class(query, banks, masks, [4, 7], 2).tolist() == [4]  # a tie: the smallest label
    only = torch.tensor([[False, True]])
    assert nearest_class(query, banks, masks, [4, 7], 2, only).tolist() == [7]
    with pytest.raises(NotTrained):
        nearest_class(query, [], [], [], 1)


def test_activations_are_kept_in_8_bits_and_constants_exactly():
    values = torch.rand(20, 4, 3, 3) * 7 - 2
    kept = Quantised.of(values)
    assert kept.codes.dtype == torch.uint8
    step = float(values.max() - values.min()) / 255
    assert float((kept.values(torch.arange(20)) - values).abs().max()) <= step / 2 + 1e-6
    constant = Quantised.of(torch.full((3, 2), 1.5))
    assert torch.equal(constant.values(torch.arange(3)), torch.full((3, 2), 1.5))


def test_draws_are_even_over_recent_classes_and_older_ones_are_deleted():
    memory, random = ShortTerm(1), torch.Generator().manual_seed(0)
    memory.add(0, {label: torch.full((5, 2), float(label + 1)) for label in (0, 1, 2)})
    values, labels = memory.draw(11, random)
    assert torch.bincount(labels).tolist() == [4, 4, 3]
    assert torch.equal(values[:, 0], labels.float() + 1)
    memory.add(1, {3: torch.ones(5, 2)})
    assert memory.classes == [3] and len(memory.draw(9, random)[1]) == 9  # with replacement


def test_an_experience_keeps_the_number_of_connections_and_cuts_what_must_go(started):
    run = started()
    wiring = run.learner.wiring
    initial = [int(mask.sum()) for mask in wiring.masks]
    assert wiring.masks[0].all()  # the first convolution is dense
    assert all(0.25 < float(mask.float().mean()) < 0.55 for mask in wiring.masks[1:])
    cuts, rewire = [], wiring.rewire

    def spy(random):
        rewire(random)
        for number, mask in enumerate(wiring.masks):
            left = cut(wiring.types[number], wiring.types[number + 1], mask)
            cuts.append(int(left.sum()))
        weights = [layer.weight[~mask] for layer, mask in zip(wiring.layers, wiring.masks, strict=True)]
        assert all((weight == 0).all() for weight in weights)

    wiring.rewire = spy
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.advance()
        run.advance()
    assert cuts and not any(cuts)
    assert [int(mask.sum()) for mask in wiring.masks] == initial
    for layer, mask in zip(wiring.layers, wiring.masks, strict=True):
        assert (layer.weight[~mask] == 0).all()


def test_frozen_units_never_change_and_units_only_mature(started, stream):
    run = started()
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    wiring, before = run.learner.wiring, []
    for _ in stream:
        run.advance()
        now = []
        for number, layer in enumerate(wiring.layers):
            mask = wiring.masks[number].view(*wiring.masks[number].shape, *[1] * (layer.weight.dim() - 2))
            now.append(((layer.weight * mask).detach().clone(), layer.bias.detach().clone()))
        with torch.no_grad():
            early = F.relu(wiring.layers[0](inputs))
        state = [frozen.clone() for frozen in wiring.frozen], [types == PLASTIC for types in wiring.types]
        for frozen, plastic, weights, outputs in before:
            for number, units in enumerate(frozen):
                assert torch.equal(weights[number][0][units], now[number][0][units])
                assert torch.equal(weights[number][1][units], now[number][1][units])
                assert wiring.frozen[number][units].all()
                assert (plastic[number + 1] | ~state[1][number + 1]).all()  # nothing becomes plastic again
            assert torch.equal(outputs[:, frozen[0]], early[:, frozen[0]])
        before.append((*state, now, early))
    assert before[0][0][0].any() and not before[0][0][2].any()  # early units freeze first
    assert before[-1][0][2].any()


def test_the_last_layer_is_silent_where_units_are_plastic(started, stream):
    run = started()
    run.advance()
    plastic = run.learner.wiring.types[-1] == PLASTIC
    features = run.learner.student.features({"input": stream[0].test.tensors["input"]})
    assert plastic.any() and (features[:, plastic] == 0).all() and (features[:, ~plastic] > 0).any()


def test_replayed_activations_give_the_features_of_the_inputs(started, stream):
    run = started(stored=50)
    run.advance()
    learner = run.learner
    assert learner.short.classes == [0, 1]
    assert all(item.codes.dtype == torch.uint8 for _, item in learner.short.held.values())
    labels = stream[0].records.column("label")
    inputs = stream[0].records.tensors["input"][np.flatnonzero(labels == 1)]
    stored = learner.short.held[1][1]
    assert tuple(stored.codes.shape) == (24, 16, 4, 4)  # all 24 of the class, no raw image
    with torch.no_grad():
        direct = learner.student.features({"input": inputs})
        replayed = learner._go_on(stored.values(torch.arange(len(inputs))))
    assert float((direct - replayed).norm() / direct.norm()) < 0.01


def test_only_classes_of_recent_experiences_are_replayed(started):
    for recent, expected in ((0, [[], [], []]), (1, [[], [0, 1], [2, 3]]), (2, [[], [0, 1], [0, 1, 2, 3]])):
        run = started("mlp", recent=recent)
        found = []
        while not run.finished:
            run.advance()
            found.append(run.learner.replayed)
        assert found == expected


def test_it_has_no_classifier_and_never_trains_the_head(started, stream):
    run = started("mlp")
    head = run.learner.student.model.head.weight.detach().clone()
    run.advance()
    assert torch.equal(head, run.learner.student.model.head.weight)
    with torch.no_grad():
        run.learner.student.model.head.weight.zero_()
    assert run.tests.accuracies(run.learner)[0] > 0.8


def test_early_classes_are_kept_where_a_dense_network_forgets_them(stream, cpu):
    training = Training(epochs=8, lr=1.0, batch_size=24, optimizer="adadelta")
    dense = {"sparsity": 0.0, "least": 100.0, "freeze": False, "recent": 0}
    found = {}
    for name, settings in (("sharp", {}), ("dense", dense)):
        model = build_model("mlp", (1, 8, 8), 6, seed=0, width=128)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = learn("sharp", stream, model, training=training, runtime=cpu(), phases=4, **settings)
        found[name] = outcome
    assert found["sharp"].matrix.scores[-1, 0] > found["dense"].matrix.scores[-1, 0] + 0.2
    assert found["sharp"].measures()["density"] == pytest.approx(0.4, abs=0.03)
    assert found["dense"].measures()["frozen units"] == 0.0


def test_bad_input_is_named(stream, few_digits, small_mlp, cpu):
    for wrong in ({"sparsity": 1.0}, {"recent": -1}, {"temperature": 0.0}, {"phases": 0}, {"neighbours": 30}, {"least": 0.0}, {"replay_batch": 0}):  # fmt: skip
        with pytest.raises(InvalidHyperparameter):
            build_learner("sharp", wrong)
    decay = Training(epochs=1, weight_decay=0.1)
    with pytest.raises(InvalidHyperparameter, match="frozen"):
        Run(build_learner("sharp"), stream, small_mlp(6), training=decay, runtime=cpu())
    for early in (0, 2):
        with pytest.raises(ModelMismatch, match="early"):
            Run(build_learner("sharp", {"early": early}), stream, small_mlp(6), runtime=cpu())
    labels = few_digits.column("label")
    few = few_digits.select(np.r_[np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:1]])
    with pytest.raises(InvalidRecords, match="one record"):
        learn("sharp", from_parts([(few, few)], "class"), small_mlp(2), runtime=cpu())
    both = few_digits.select(labels < 2)
    again = from_parts([(both, both), (both, both)], "class", returning=True)
    with pytest.raises(InvalidStream, match="learned before"):
        learn("sharp", again, small_mlp(2), runtime=cpu())


def test_a_layer_without_plastic_units_is_warned_of(stream, cpu):
    model = build_model("mlp", (1, 8, 8), 6, seed=0, width=4)
    with pytest.warns(UserWarning, match="capacity"):
        learn("sharp", stream, model, training=TRAINING, runtime=cpu(), least=100.0)
