from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from palimpsest.core.errors import (
    InvalidHyperparameter,
    ModelMismatch,
    PickleRefused,
    UnknownName,
    UnreadableCheckpoint,
)
from palimpsest.models import build_model
from palimpsest.parts.activations import head_name
from palimpsest.retain.heads import resize_head


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 8, 12), (1, 7, 9)])
def test_images_of_any_size_and_channel_count_give_one_logit_per_class(shape):
    model = build_model("small_vit", shape, 7, width=16, layers=1, patch=min(shape[1:]) // 3)
    assert model(torch.rand(3, *shape)).shape == (3, 7)


def test_sizes_are_as_asked_and_query_key_value_are_layers_of_their_own():
    model = build_model("small_vit", (1, 8, 8), 10, width=24, layers=3, heads=4, patch=4, hidden=40)
    square = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.shape == (24, 24)
    ]
    assert len(square) == 3 * 4, "query, key, value and output in each of three blocks"
    tokens = model.encoder(model.prepared(torch.rand(2, 1, 8, 8))).last_hidden_state
    assert tokens.shape == (2, 1 + 4, 24)


def test_the_head_is_found_grows_and_keeps_its_rows():
    model = build_model("small_vit", (1, 8, 8), 4, width=16)
    assert head_name(model) == "head"
    x = torch.rand(2, 1, 8, 8)
    before = model(x)
    resize_head(model, 6)
    assert model(x).shape == (2, 6)
    assert torch.allclose(model(x)[:, :4], before)
    assert torch.allclose(model.head(model.features(x)), model(x))


def test_the_seed_decides_the_weights():
    one, same, other = (build_model("small_vit", (1, 8, 8), 3, seed=seed, width=16) for seed in (1, 1, 2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 30, "heads": 4}, "heads"),
        ({"patch": 9}, "patch"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"depth": 2}, "depth"),
    ],
)
def test_bad_sizes_are_refused(settings, words):
    with pytest.raises(InvalidHyperparameter, match=words):
        build_model("small_vit", (1, 8, 8), 3, **settings)


def test_what_is_no_image_is_refused():
    with pytest.raises(ModelMismatch, match="height"):
        build_model("small_vit", (64,), 3)
    with pytest.raises(ModelMismatch, match="grey"):
        build_model("small_vit", (3, 8, 8), 3)(torch.rand(2, 2, 8, 8))


@pytest.fixture
def folder(tmp_path):
    build_model("small_vit", (3, 16, 16), 5, width=16, patch=8).encoder.save_pretrained(tmp_path)
    return tmp_path


def test_published_weights_come_with_a_new_head_and_take_small_grey_images(folder):
    model = build_model("published_vit", (1, 8, 8), 4, place=str(folder))
    saved = build_model("small_vit", (3, 16, 16), 5, width=16, patch=8)
    for name, value in saved.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    grey = torch.rand(2, 1, 8, 8)
    larger = nn.functional.interpolate(grey, (16, 16), mode="bilinear").expand(-1, 3, -1, -1)
    assert model(grey).shape == (2, 4)
    assert torch.allclose(model(grey), model(larger), atol=1e-6)


def test_inputs_are_scaled_as_the_preprocessor_of_the_weights_says(folder):
    x = torch.rand(2, 3, 16, 16)
    plain = build_model("published_vit", (3, 16, 16), 4, place=str(folder))
    told = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    scaled = build_model("published_vit", (3, 16, 16), 4, place=str(folder))
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[
        :, None, None
    ]
    assert torch.allclose(scaled(x), plain(by_hand), atol=1e-6)


def test_weights_that_cannot_be_used_are_refused(folder, tmp_path):
    with pytest.raises(UnreadableCheckpoint, match="nowhere"):
        build_model("published_vit", (3, 16, 16), 4, place=str(tmp_path / "nowhere"))
    with pytest.raises(ModelMismatch, match="3 channels"):
        build_model("published_vit", (2, 16, 16), 4, place=str(folder))
    with pytest.raises(InvalidHyperparameter, match="width"):
        build_model("published_vit", (3, 16, 16), 4, place=str(folder), width=3)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PickleRefused, match="safetensors"):
        build_model("published_vit", (3, 16, 16), 4, place=str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(ModelMismatch, match="gpt2"):
        build_model("published_vit", (3, 16, 16), 4, place=str(folder))


def test_a_vision_transformer_of_timm_serves_as_encoder_and_others_are_refused():
    pytest.importorskip("timm")
    small = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "pretrained": False}
    model = build_model("published_vit", (1, 8, 8), 4, place="timm:vit_tiny_patch16_224", **small)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4) and head_name(model) == "head"
    assert model.size == (32, 32) and model.channels == 3
    with pytest.raises(ModelMismatch, match=r"attn\.qkv"):
        build_model("published_vit", (3, 8, 8), 4, place="timm:resnet18", pretrained=False)
    with pytest.raises(UnknownName, match="vit_tiny"):
        build_model("published_vit", (3, 8, 8), 4, place="timm:vit_tinny_patch16_224")
