from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from palimpsest.core.errors import (
    CannotWrite,
    ModelMismatch,
    NonFinite,
    PickleRefused,
    UnreadableCheckpoint,
)
from palimpsest.parts.checkpoint import load_model, looks_like_pickle, read_checkpoint, save_model
from palimpsest.parts.training import RECIPE_ATTRIBUTE, TrainingRecipe, recipe_of


class Tied(nn.Module):
    """A body and a head that share one tensor, with batch norm for its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.head.weight = self.body.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Tied()
    model(torch.randn(16, 4))
    setattr(model, RECIPE_ATTRIBUTE, TrainingRecipe(epochs=7, lr=0.01, clip=1.0))
    return model.eval()


def test_what_is_loaded_is_what_was_saved_with_buffers_ties_and_recipe(trained, tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    save_model(trained, path)
    before = Tied()
    loaded = load_model(path, before)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.head.weight is loaded.body.weight
    assert recipe_of(loaded) == TrainingRecipe(epochs=7, lr=0.01, clip=1.0)
    assert not loaded.training
    assert not torch.equal(before.body.weight, trained.body.weight), "the model given was changed"


def test_any_reader_of_safetensors_finds_every_name_of_tied_weights(trained, tmp_path):
    save_model(trained, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(trained.state_dict())
    assert torch.equal(stored["head.weight"], stored["body.weight"])


def test_the_same_model_gives_the_same_bytes_and_notes_are_kept(trained, tmp_path):
    first = save_model(trained, tmp_path / "a.safetensors", {"request": "label = 3"})
    second = save_model(trained, tmp_path / "b.safetensors", {"request": "label = 3"})
    assert first == second == read_checkpoint(tmp_path / "a.safetensors").sha256
    stored = read_checkpoint(tmp_path / "a.safetensors")
    assert stored.architecture == "Tied"
    assert stored.notes["request"] == "label = 3"


def test_a_file_changed_after_it_was_written_is_refused_if_its_hash_is_known(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    sha256 = save_model(trained, path)
    assert load_model(path, Tied(), sha256)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match="was changed"):
        load_model(path, Tied(), sha256)


@pytest.mark.parametrize("scheme", ["memory://study", "file://{tmp}"])
def test_weights_travel_through_fsspec_urls(trained, tmp_path, scheme):
    url = f"{scheme.format(tmp=tmp_path)}/weights/model.safetensors"
    sha256 = save_model(trained, url)
    assert torch.equal(load_model(url, Tied(), sha256).body.weight, trained.body.weight)


def test_an_unknown_scheme_is_a_clear_error_on_both_sides(trained):
    with pytest.raises(CannotWrite, match="nowhere://x"):
        save_model(trained, "nowhere://x/model.safetensors")
    with pytest.raises(UnreadableCheckpoint, match="nowhere://x"):
        load_model("nowhere://x/model.safetensors", trained)


def test_weights_of_another_model_are_refused_naming_what_differs(trained, tmp_path):
    save_model(trained, tmp_path / "model.safetensors")
    other = Tied()
    other.norm = nn.Identity()
    other.extra = nn.Linear(2, 2)
    other.head.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ModelMismatch) as problem:
        load_model(tmp_path / "model.safetensors", other)
    said = str(problem.value)
    assert "missing: 'extra.bias', 'extra.weight'" in said
    assert "'norm.bias'" in said.partition("not in the model")[2]
    assert "head.bias (4,) instead of (5,)" in said


def test_an_absent_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableCheckpoint, match=r"absent\.safetensors"):
        load_model(tmp_path / "absent.safetensors", Tied())


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_unreadable_and_never_called_a_pickle(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    torch.manual_seed(0)
    save_model(Tied(), folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UnreadableCheckpoint) as problem:
        load_model(folder / "cut.safetensors", Tied())
    assert not isinstance(problem.value, PickleRefused)


@given(length=st.integers(2, 100_000_000), rest=st.binary(max_size=16))
def test_a_header_length_is_never_taken_for_a_pickle(length, rest):
    assert not looks_like_pickle(struct.pack("<Q", length) + rest)


@given(
    value=st.dictionaries(st.text(max_size=5), st.lists(st.integers(), max_size=5), min_size=1),
    protocol=st.integers(2, 5),
)
def test_every_binary_pickle_is_recognised(value, protocol):
    assert looks_like_pickle(pickle.dumps(value, protocol))


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["model.pt", "model.pkl", "pytorch_model.bin", "disguised.safetensors"])
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_is_refused_whatever_its_name_and_not_run(trained, tmp_path, name, kind):
    path, trace = tmp_path / name, tmp_path / "executed"
    if kind == "torch":
        torch.save({"weights": trained.state_dict(), "evil": Evil(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(PickleRefused, match="safetensors"):
        load_model(path, Tied())
    assert not trace.exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_at_loading(trained, tmp_path, bad):
    with torch.no_grad():
        trained.norm.running_mean[2] = bad
    save_model(trained, tmp_path / "model.safetensors")
    with pytest.raises(NonFinite, match=r"norm\.running_mean"):
        load_model(tmp_path / "model.safetensors", Tied())


def test_state_that_is_no_tensor_cannot_be_saved(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self) -> str:
            return "text"

    with pytest.raises(ModelMismatch, match="_extra_state"):
        save_model(Odd(2, 2), tmp_path / "model.safetensors")


def test_a_place_below_a_regular_file_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotWrite, match=r"file/model\.safetensors"):
        save_model(trained, tmp_path / "file" / "model.safetensors")
