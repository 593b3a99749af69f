"""Causal language models, by Hub name or from a local folder (safetensors or GGUF)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palimpsest.core.errors import (
    InvalidHyperparameter,
    MissingDependency,
    ModelMismatch,
    PickleRefused,
    UnreadableCheckpoint,
)
from palimpsest.parts.lora import add_lora
from palimpsest.parts.published import place_of
from palimpsest.parts.tokenizers import gguf_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_causal_lm(
    place: str,
    dtype: str = "float32",
    lora: Mapping[str, Any] | None = None,
    bits: int | None = None,
    adapter: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """A causal language model.

    Args:
        place: Name on the Hub, folder with safetensors, GGUF file (or a folder with a single one), or a short name
            (`palimpsest.parts.published`).
        dtype: "float32", "bfloat16" or "float16".
        lora: Settings of `palimpsest.parts.lora.add_lora` (r, alpha, dropout, layers, targets): only the
            adapters train. Give an empty mapping for its defaults.
        bits: 8 or 4 loads the weights quantized by bitsandbytes; with `lora` that is QLoRA.
        adapter: Folder of a trained peft adapter to put onto the model.
        revision: Of the Hub.

    Raises:
        MissingDependency: Without transformers (or peft, or bitsandbytes where it is asked for).
        UnreadableCheckpoint: If there is no such model.
        PickleRefused: If the weights are a pickle.
        InvalidHyperparameter: For settings that do not go together.
    """
    if dtype not in DTYPES:
        raise InvalidHyperparameter(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    if bits not in (None, 4, 8):
        raise InvalidHyperparameter(f"bits is 4, 8 or None, not {bits!r}.")
    if bits and lora is None:
        raise InvalidHyperparameter("Quantized weights do not train: give lora={} beside bits (QLoRA).")
    folder, gguf = gguf_of(place_of(place))
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    settings: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if gguf:
        settings["gguf_file"] = gguf
    else:
        settings["use_safetensors"] = True
    if revision:
        settings["revision"] = revision
    if bits:
        settings["quantization_config"] = _quantized(bits, DTYPES[dtype])
    _refuse_pickles(folder, gguf)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **settings)
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise UnreadableCheckpoint(f"Cannot load a language model from '{place}': {problem}") from problem
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return model if lora is None else add_lora(model, **lora)


def _refuse_pickles(folder: str, gguf: str | None) -> None:
    path = Path(folder)
    if gguf or not path.is_dir() or list(path.glob("*.safetensors")):
        return
    pickles = sorted(item.name for item in path.iterdir() if item.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise PickleRefused(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when it is loaded: convert it "
            "to safetensors."
        )


def _quantized(bits: int, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports] # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as missing:
        raise MissingDependency("bitsandbytes", "quantized") from missing
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as missing:
        raise MissingDependency("peft", "language") from missing
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, RuntimeError) as problem:
        raise ModelMismatch(f"The adapter in '{adapter}' does not fit the model: {problem}") from problem
