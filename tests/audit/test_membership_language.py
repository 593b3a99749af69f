"""Membership signals of language models, on plain numbers and on a table that was overfitted."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from palimpsest.audit.membership import language_signals as language
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import auc
from palimpsest.parts.tokens import IGNORED


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=30), st.floats(0.01, 1))
def test_min_k_averages_the_smallest_scores(values: list[float], k: float):
    count = max(1, math.floor(k * len(values)))
    found = language.min_k(torch.tensor(values, dtype=torch.float64), k)
    assert found == pytest.approx(np.mean(sorted(values)[:count]))


def test_min_k_of_everything_is_the_loss():
    lp = torch.tensor([-1.0, -2.0, -6.0])
    assert language.min_k(lp, 1.0) == pytest.approx(language.mean_log_probability(lp)) == pytest.approx(-3)


def test_standardised_scores_agree_with_their_formula():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9).double(), torch.randint(9, (6,))
    found = language.standardised_log_probabilities(logits, targets)
    for row, target, value in zip(logits, targets.tolist(), found.tolist(), strict=True):
        p = row.softmax(0)
        mean = (p * p.log()).sum()
        deviation = ((p * p.log() ** 2).sum() - mean**2).sqrt()
        assert value == pytest.approx(float((p[target].log() - mean) / deviation))


def test_a_ruled_out_token_and_a_certain_model_give_finite_scores():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [200.0, 0.0, 0.0]])
    assert torch.isfinite(language.standardised_log_probabilities(logits, torch.tensor([2, 0]))).all()


def test_zlib_reference_and_lowercase_scores_are_the_loss_in_other_units():
    lp, other = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -3.0])
    assert language.zlib_score(lp, "Öl") == pytest.approx(-2 / len(zlib.compress("Öl".encode())))
    assert language.reference_score(lp, other) == pytest.approx(0.5)
    assert language.lowercase_score(lp, other) == pytest.approx(-2 / 2.5)


def test_the_gradient_norm_is_that_of_the_tensors_and_leaves_no_gradient_behind():
    weight, unused = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(2))
    loss = (weight**2).sum() / 2
    assert language.gradient_norm(loss, [weight, unused]) == pytest.approx(-2.5)
    assert weight.grad is None
    assert language.gradient_norm((weight**2).sum() / 2, [weight], p=1) == pytest.approx(-7)


def test_a_table_overfitted_on_thirty_texts_gives_them_away():
    torch.manual_seed(0)
    texts = torch.randint(40, (60, 20))
    table, reference = nn.Embedding(1600, 40), nn.Embedding(40, 40)

    def logits(model: nn.Embedding, text: torch.Tensor) -> torch.Tensor:
        context = text[..., :-1] if model.num_embeddings == 40 else text[..., :-2] * 40 + text[..., 1:-1]
        return model(context)[..., -18:, :]

    for model, seen in ((table, texts[:30]), (reference, texts[30:45])):
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(logits(model, seen).flatten(0, 1), seen[:, 2:].flatten()).backward()
            optimizer.step()
    scores: dict[str, list[float]] = {"loss": [], "min_k": [], "reference": []}
    for text in texts:
        lp = language.token_log_probabilities(logits(table, text), text[2:])
        lp_reference = language.token_log_probabilities(logits(reference, text), text[2:])
        scores["loss"].append(language.mean_log_probability(lp))
        scores["min_k"].append(language.min_k(lp, 0.4))
        scores["reference"].append(language.reference_score(lp, lp_reference))
    truth = np.r_[np.ones(30, bool), np.zeros(15, bool), np.zeros(15, bool)]
    # The reference model saw texts 30 to 44: only the last 15 are new to both.
    new = np.r_[np.arange(30), np.arange(45, 60)]
    value = {
        name: auc(np.array(v)[new][truth[new]], np.array(v)[new][~truth[new]]) for name, v in scores.items()
    }
    assert value["loss"] > 0.9
    assert abs(value["min_k"] - value["loss"]) < 0.05
    assert value["reference"] >= value["loss"] - 0.02


@pytest.mark.parametrize("k", [0.0, -0.1, 1.01])
def test_a_share_outside_its_range_is_refused(k: float):
    with pytest.raises(InvalidAudit, match=r"\(0, 1\]"):
        language.min_k(torch.tensor([-1.0]), k)


def test_texts_without_a_scored_token_and_bad_numbers_are_refused():
    empty = torch.empty(0)
    with pytest.raises(InvalidAudit, match="2 tokens or more"):
        language.mean_log_probability(empty)
    with pytest.raises(InvalidAudit, match="2 tokens or more"):
        language.token_log_probabilities(torch.empty(0, 5), torch.empty(0, dtype=torch.long))
    with pytest.raises(InvalidAudit, match="NaN"):
        language.min_k(torch.tensor([math.nan]))
    with pytest.raises(InvalidAudit, match="same tokens"):
        language.reference_score(torch.tensor([-1.0]), torch.tensor([-1.0, -2.0]))
    with pytest.raises(InvalidAudit, match="vocabulary"):
        language.token_log_probabilities(torch.zeros(1, 5), torch.tensor([5]))
    with pytest.raises(InvalidAudit, match="no loss"):
        language.lowercase_score(torch.tensor([-1.0]), torch.tensor([0.0]))
    with pytest.raises(InvalidAudit, match="trainable"):
        language.gradient_norm(torch.tensor(1.0), [])


def test_a_padded_batch_scores_every_text_as_alone():
    torch.manual_seed(0)
    logits, lengths, texts = torch.randn(5, 9, 11).double(), [9, 2, 5, 7, 3], list("abcde")
    labels = torch.randint(11, (5, 9))
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORED
    labels[3, :2] = IGNORED  # a prompt
    scores, mask = language.label_log_probabilities(logits, labels)
    standard, _ = language.standardised_label_scores(logits, labels)
    reference = scores - 1.0
    batch = {
        "loss": language.mean_log_probabilities(scores, mask),
        "zlib": language.zlib_scores(scores, mask, texts),
        "reference": language.reference_scores(scores, reference, mask),
        "min_k": language.min_k_scores(scores, mask, 0.4),
        "min_k++": language.min_k_scores(standard, mask, 0.4),
    }
    for row, text in enumerate(texts):
        at = torch.nonzero(labels[row, 1:] != IGNORED)[:, 0]
        lp = torch.stack([logits[row, t].log_softmax(0)[labels[row, t + 1]] for t in at])
        z = language.standardised_log_probabilities(logits[row, at], labels[row, at + 1])
        alone = {
            "loss": lp.mean(),
            "zlib": lp.mean() / len(zlib.compress(text.encode())),
            "reference": 1.0,
            "min_k": lp.sort().values[: max(1, math.floor(0.4 * len(lp)))].mean(),
            "min_k++": z.sort().values[: max(1, math.floor(0.4 * len(z)))].mean(),
        }
        for name, value in alone.items():
            assert float(batch[name][row]) == pytest.approx(float(value)), name
    lower = language.lowercase_scores(-batch["loss"], -2 * batch["loss"])
    assert lower.tolist() == pytest.approx([-0.5] * 5)


def test_the_last_token_of_every_row_can_be_left_out():
    mask = torch.tensor([[True, True, False, True], [False, True, False, False], [False] * 4])
    assert language.without_last(mask).tolist() == [[True, True, False, False], [False] * 4, [False] * 4]


def test_a_short_text_has_one_token_or_as_released_none():
    scores, mask = torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert language.min_k_scores(scores, mask, 0.2).tolist() == [-3.0]
    assert math.isnan(language.min_k_scores(scores, mask, 0.2, fewest=0))


def test_bad_batches_are_refused_with_their_rows():
    scores, mask = torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3])
    with pytest.raises(InvalidAudit, match=r"rows \[1\]"):
        language.mean_log_probabilities(scores, mask)
    with pytest.raises(InvalidAudit, match=r"NaN or infinity in rows \[0\]"):
        language.mean_log_probabilities(torch.tensor([[math.nan, 0.0]]), torch.tensor([[True, False]]))
    # What is masked does not matter.
    assert (
        float(
            language.mean_log_probabilities(torch.tensor([[math.nan, -2.0]]), torch.tensor([[False, True]]))
        )
        == -2
    )
    with pytest.raises(InvalidAudit, match="mask of their shape"):
        language.min_k_scores(scores, mask[:1])
    with pytest.raises(InvalidAudit, match="One text per row"):
        language.zlib_scores(scores[:1], mask[:1], ["a", "b"])
