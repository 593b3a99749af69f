from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.models import build_model
from palimpsest.retain import Run, Training, build_learner, learn, parse_stream
from palimpsest.retain.methods.bic import corrected, drawn, fitted
from palimpsest.retain.methods.lwf_mc import sigmoid_loss

TRAINING = Training(epochs=6, lr=0.1, batch_size=16)


@pytest.fixture(scope="module")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


def test_only_the_newest_classes_are_corrected():
    logits, newest = torch.randn(5, 4), torch.tensor([False, False, True, False])
    found = corrected(logits, newest, 0.5, 2.0)
    assert torch.equal(found[:, [0, 1, 3]], logits[:, [0, 1, 3]])
    torch.testing.assert_close(found[:, 2], 0.5 * logits[:, 2] + 2)


def test_the_correction_is_where_an_independent_optimiser_ends():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(60)
    logits = 2 * F.one_hot(labels, 4).float() + torch.randn(240, 4, generator=random)
    newest = torch.tensor([False, False, True, True])
    biased = torch.where(newest, 2 * logits + 3, logits)
    biased = torch.cat([biased, torch.full((240, 1), -math.inf)], 1)  # a class to come

    def loss(x):
        z = np.where(newest.numpy(), x[0] * biased[:, :4].numpy() + x[1], biased[:, :4].numpy())
        return (np.log(np.exp(z).sum(1)) - z[np.arange(240), labels.numpy()]).mean()

    expected = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10}).x
    more = torch.cat([newest, torch.tensor([False])])
    alpha, beta = fitted(biased, labels, more, 1500, 0.05, 240, random)
    assert alpha == pytest.approx(expected[0], abs=0.02) and beta == pytest.approx(expected[1], abs=0.05)
    assert beta < -1 and alpha < 0.9  # it takes back what was added


def test_held_out_records_are_balanced_and_not_learned(stream, small_mlp, cpu):
    run = Run(build_learner("bic", {"memory": 60, "correction_epochs": 1}), stream, small_mlp(6), training=TRAINING, runtime=cpu())  # fmt: skip
    run.advance()
    learned, held = run.learner._divided(stream[1])
    assert np.unique(held.column("label"), return_counts=True)[1].tolist() == [2] * 4  # a tenth of 24
    assert not set(learned.ids) & set(held.ids)
    assert len(learned) + len(held) == 48 + len(run.learner.kept)
    out = drawn(np.array([0] * 5 + [1] * 3), 2, np.random.default_rng(0))
    assert out[:5].sum() == out[5:].sum() == 2


def test_the_correction_lowers_the_newest_classes(stream, small_mlp, cpu):
    run = Run(build_learner("bic", {"memory": 30, "correction_lr": 0.01}), stream, small_mlp(6), training=TRAINING, runtime=cpu())  # fmt: skip
    run.advance()
    assert run.learner.figures == {"alpha": 1.0, "beta": 0.0}  # nothing to balance yet
    run.advance()
    run.advance()
    assert run.learner.newest.tolist() == [False] * 4 + [True] * 2
    inputs = torch.cat([experience.test.tensors["input"] for experience in stream])
    plain = run.learner.student.predict({"input": inputs})
    found = run.learner.predict({"input": inputs})
    assert run.learner.alpha != 1.0
    assert (found >= 4).sum() <= (plain >= 4).sum()


def test_fitting_the_correction_does_not_touch_the_network(stream, small_mlp, cpu, weights):
    found = [
        learn("bic", stream.__class__(stream.experiences[:2], "class", 6), small_mlp(6), training=TRAINING, runtime=cpu(), memory=30, correction_epochs=epochs)
        for epochs in (1, 50)
    ]  # fmt: skip
    assert torch.equal(*(weights(outcome.learner) for outcome in found))
    assert found[0].learner.alpha != found[1].learner.alpha


def test_both_readings_of_the_weights_of_the_loss():
    learned, kept = torch.tensor(2.0), torch.tensor(3.0)
    published, mammoth = (build_learner("bic", {"weighting": name}) for name in ("published", "mammoth"))
    assert published._weighted(learned, kept, 0.8, 4).item() == pytest.approx(0.2 * 2 + 0.8 * 3)
    assert mammoth._weighted(learned, kept, 0.8, 4).item() == pytest.approx(2 + 4 / 5 * 3)


def test_it_keeps_more_than_plain_descent(stream, small_mlp, cpu):
    accuracy = {
        name: learn(name, stream, small_mlp(6), training=TRAINING, runtime=cpu(), **settings).matrix.average
        for name, settings in (("finetune", {}), ("bic", {"memory": 60, "correction_lr": 0.01}))
    }
    assert accuracy["bic"] > accuracy["finetune"] + 0.15


def test_bad_input_of_bic_is_named(stream, small_mlp, cpu):
    for wrong in ({"memory": 0}, {"held_out": 1.0}, {"temperature": 0.0}, {"correction_epochs": 0}, {"weighting": "avalanche"}):  # fmt: skip
        with pytest.raises(InvalidHyperparameter):
            build_learner("bic", wrong)
    with pytest.raises(InvalidHyperparameter, match="at least 8 for 4 classes"):
        learn("bic", stream, small_mlp(6), training=TRAINING, runtime=cpu(), memory=6)


def test_the_loss_of_lwf_mc_is_the_sum_over_classes_met_by_hand():
    logits, old = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    labels, past = torch.tensor([2, 3, 2]), torch.tensor([True, True, False, False, False])
    met = torch.tensor([True, True, True, True, False])
    whole = 0.0
    for row in range(3):
        for label in range(4):
            p = 1 / (1 + math.exp(-logits[row, label]))
            g = 1 / (1 + math.exp(-old[row, label])) if past[label] else float(labels[row] == label)
            whole -= g * math.log(p) + (1 - g) * math.log(1 - p)
    assert sigmoid_loss(logits, labels, old, past, met).item() == pytest.approx(whole / 3, rel=1e-12)


def test_lwf_mc_keeps_more_classes_than_plain_descent(digits, cpu):
    stream = parse_stream("class:5x2", digits)
    accuracy = {}
    for name in ("finetune", "lwf-mc"):
        model = build_model("mlp", (1, 8, 8), 10, seed=0, width=100)
        accuracy[name] = learn(name, stream, model, training=TRAINING, runtime=cpu()).matrix.average
    assert accuracy["lwf-mc"] > accuracy["finetune"] + 0.05
