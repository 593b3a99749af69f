from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingDependency, ModelMismatch
from palimpsest.models import build_model
from palimpsest.parts.answer_words import mask_answer, merge_words, normalize_word, rank_words
from palimpsest.parts.attribution import class_activation_maps, integrated_gradients
from palimpsest.parts.token_attribution import (
    answer_score,
    input_embedding,
    mask_tokens,
    rank_tokens,
    token_attribution,
)

QUADRATURES = ["published", "gausslegendre", "riemann_trapezoid", "riemann_middle"]


def cubic(x):
    return (x**3).sum(1) + 2 * x[:, 0] * x[:, 1]


def exact(x, x0):
    """Shares of `cubic` between x0 and x, integrated by hand for x0 = 0."""
    assert not x0.any()
    shares = x**3
    shares[:, :2] += (x[:, 0] * x[:, 1])[:, None]
    return shares


@pytest.mark.parametrize("quadrature", [q for q in QUADRATURES if q != "published"])
def test_captums_shares_agree_with_the_integral(quadrature):
    pytest.importorskip("captum")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = integrated_gradients(cubic, x, torch.zeros_like(x), steps=400, quadrature=quadrature)
    torch.testing.assert_close(found.values, exact(x, torch.zeros_like(x)), atol=1e-2, rtol=1e-2)
    assert (found.completeness_error.abs() < 0.02 * (1 + found.score_input.abs())).all()


def test_the_published_mean_is_the_sum_written_out():
    x, x0 = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 0.0]]).double()
    found = integrated_gradients(cubic, x, x0, steps=3, quadrature="published")
    gradients = []
    for alpha in (0.0, 0.5, 1.0):
        a, b = (x0 + alpha * (x - x0))[0].tolist()
        gradients.append([3 * a**2 + 2 * b, 3 * b**2 + 2 * a])
    torch.testing.assert_close(found.values, (x - x0) * torch.tensor(gradients).double().mean(0))
    torch.testing.assert_close(found.completeness_error, found.values.sum(1) - (cubic(x) - cubic(x0)))


def test_gauss_legendre_is_complete_with_few_steps_where_the_published_mean_is_not():
    pytest.importorskip("captum")
    x = torch.tensor([[1.5, -1.0, 2.0]]).double()
    errors = {
        name: float(integrated_gradients(cubic, x, x * 0, steps=8, quadrature=name).completeness_error.abs())
        for name in ("published", "gausslegendre")
    }
    assert errors["gausslegendre"] < 1e-5 < 0.1 < errors["published"]


def test_one_gradient_is_not_integrated(monkeypatch):
    with pytest.raises(InvalidHyperparameter, match="at least 2 steps"):
        integrated_gradients(cubic, torch.ones(1, 2), torch.zeros(1, 2), steps=1)


def test_without_captum_it_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    x = torch.ones(1, 2)
    with pytest.raises(MissingDependency, match=r"captum.*palimpsest-ml\[concepts\]"):
        integrated_gradients(cubic, x, x * 0)
    assert integrated_gradients(cubic, x, x * 0, quadrature="published").values.shape == (1, 2)
    with pytest.raises(MissingDependency, match="captum"):
        class_activation_maps(lambda x: x, nn.Identity(), x, 0)


@pytest.fixture
def classifier():
    return build_model("text_transformer", (6,), 3, seed=0, vocabulary=12).eval()


@pytest.mark.parametrize("quadrature", ["published", "gausslegendre"])
def test_tokens_that_are_the_same_in_the_baseline_get_exactly_zero(classifier, quadrature):
    if quadrature != "published":
        pytest.importorskip("captum")
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 3, 3, 4, 0, 0]])
    baseline = ids.clone()
    baseline[:, 2:4] = 0
    found = token_attribution(
        classifier, lambda t: classifier(t)[:, 1], ids, baseline, steps=64, quadrature=quadrature
    )
    assert not found.values[:, [0, 1, 4, 5]].any() and (found.values[:, 2:4] != 0).all()
    if quadrature == "gausslegendre":
        rise = (found.score_input - found.score_baseline).abs()
        assert (found.completeness_error.abs() <= 0.05 * rise + 1e-4).all()


def test_a_baseline_of_zero_vectors_silences_the_chosen_tokens(classifier):
    ids, gone = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[False, True, True, False, False, False]])
    score = lambda t: classifier(t)[:, 0]  # noqa: E731
    found = token_attribution(classifier, score, ids, None, zeroed=gone, quadrature="published")
    assert found.values[0].nonzero().flatten().tolist() == [1, 2]


def test_the_model_is_left_without_hooks(classifier):
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    before = classifier(ids)
    token_attribution(classifier, lambda t: classifier(t)[:, 0], ids, ids * 0, quadrature="published")
    assert torch.equal(classifier(ids), before) and not input_embedding(classifier)._forward_hooks


def test_a_model_without_embeddings_is_refused():
    with pytest.raises(ModelMismatch, match="no embedding"):
        input_embedding(nn.Linear(2, 2))


@pytest.mark.parametrize("positions", [[], [0, 1]])
def test_answers_need_positions_with_a_token_before(positions):
    with pytest.raises(InvalidHyperparameter, match="at least 1"):
        answer_score(
            torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), torch.tensor(positions).long()
        )


def test_grad_cam_is_the_weighted_sum_of_maps_cut_at_zero():
    pytest.importorskip("captum")
    torch.manual_seed(0)
    layer, head = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, 2)
    logits = lambda x: head(layer(x).mean((2, 3)))  # noqa: E731
    image = torch.randn(2, 1, 5, 5)
    by_hand = (head.weight[1][None, :, None, None] / 25 * layer(image)).sum(1).relu()
    found = class_activation_maps(logits, layer, image, 1)[..., 0]
    torch.testing.assert_close(found, by_hand.detach())


# Telling tokens and words


def test_tokens_are_ranked_by_their_shares_of_each_texts_positive_attribution():
    ids = torch.tensor([[2, 3, 4], [3, 5, 5]])
    values = torch.tensor([[3.0, 1.0, -9.0], [100.0, 50.0, 50.0]])
    assert rank_tokens(ids, values, 6).tolist() == [2, 3, 5] or rank_tokens(ids, values, 6).tolist() == [
        3,
        2,
        5,
    ]
    totals = {2: 0.75, 3: 0.25 + 0.5, 5: 0.5}
    assert totals[2] == totals[3] > totals[5]
    assert rank_tokens(ids, values, 6, [2]).tolist() == [3, 5]
    with pytest.raises(InvalidRecords, match="No token"):
        rank_tokens(ids, values, 6, [2, 3, 4, 5])


def test_the_first_ranked_tokens_of_each_text_are_masked_wherever_they_stand():
    ids = torch.tensor([[7, 3, 7, 4, 9], [4, 3, 9, 9, 9], [8, 8, 8, 8, 8]])
    masked = mask_tokens(ids, torch.tensor([7, 4, 3]), 2, 1)
    assert masked.tolist() == [[1, 3, 1, 1, 9], [1, 1, 9, 9, 9], [8, 8, 8, 8, 8]]


@given(
    st.lists(st.lists(st.integers(2, 9), min_size=6, max_size=6), min_size=1),
    st.permutations(range(2, 8)),
    st.integers(1, 4),
)
def test_masking_agrees_with_a_loop_over_texts(texts, ranked, k):
    expected = []
    for text in texts:
        gone = [token for token in ranked if token in text][:k]
        expected.append([1 if token in gone else token for token in text])
    assert mask_tokens(torch.tensor(texts), torch.tensor(ranked), k, 1).tolist() == expected


def test_each_answer_weighs_the_same_in_the_ranking_of_words():
    loud = [("Cairo", 90.0), ("born", 10.0), ("dull", -500.0)]
    soft = [("Cairo's", 0.1), ("Nile", 0.9), ("--", 0.5)]
    ranked = dict(rank_words([loud, soft, [("nothing", -1.0)]]))
    assert next(iter(ranked)) == "cairo" and ranked["cairo"] == pytest.approx(0.9 + 0.1 / 1.5)
    assert ranked["dull"] == 0 and "nothing" not in ranked


def test_only_tokens_with_a_sign_open_words():
    assert merge_words(["Ba", "sil", "\u0120was", "\u2581", "\u2581here"], [1, 2, 3, 4, 5]) == [
        ("Basil", 3), ("was", 3), ("here", 9),
    ]  # fmt: skip
    assert [normalize_word(w) for w in ("Mahfouz's,", "\u201cCairo\u201d", "...")] == [
        "mahfouz's",
        "cairo",
        "",
    ]


def test_names_left_over_are_masked_too_and_nothing_inside_other_words():
    masked, picked = mask_answer("Basil Al Mahfouz basilisk", ["basil"], names=["Basil Al Mahfouz"])
    assert masked == "*** Al *** basilisk" and picked == ["basil"]
    assert mask_answer("cost: a\\1b", ["a\\1b"], mask=r"\g<0>")[0] == "cost: \\g<0>"


def test_an_answer_of_stop_words_alone_is_refused():
    with pytest.raises(InvalidRecords, match="stop words"):
        mask_answer("the author was", ["the", "author"])
