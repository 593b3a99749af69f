from __future__ import annotations

import pytest
import torch

from palimpsest.core.errors import ModelMismatch
from palimpsest.models import build_model


@pytest.fixture(params=[0, 1, 2], ids=["bag", "one layer", "two layers"])
def classifier(request):
    return build_model("text_transformer", (8,), 3, seed=0, vocabulary=20, depth=request.param).eval()


def test_padding_says_nothing(classifier):
    short, long = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(classifier(short), classifier(long))
    torch.testing.assert_close(classifier(short), classifier(short[:, :3]))


def test_texts_of_a_batch_do_not_see_each_other(classifier):
    texts = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    torch.testing.assert_close(classifier(texts), torch.cat([classifier(texts[:1]), classifier(texts[1:])]))


def test_a_text_of_nothing_but_padding_has_finite_logits(classifier):
    assert torch.isfinite(classifier(torch.zeros(2, 8, dtype=torch.long))).all()


@pytest.mark.parametrize(("depth", "same"), [(0, True), (1, False)])
def test_only_a_bag_is_blind_to_order(depth, same):
    model = build_model("text_transformer", (8,), 3, seed=0, vocabulary=20, depth=depth).eval()
    one, other = model(torch.tensor([[5, 6, 7]])), model(torch.tensor([[7, 6, 5]]))
    assert torch.allclose(one, other, atol=1e-6) == same


def test_images_are_refused():
    with pytest.raises(ModelMismatch, match="token ids"):
        build_model("text_transformer", (1, 8, 8), 3)
