import pytest
import torch

from palimpsest.core.errors import CannotWrite, PickleRefused, UnreadableCheckpoint
from palimpsest.parts.importance import Measure
from palimpsest.parts.importance_file import load_importance, save_importance

VALUES = {"head.weight": torch.rand(3, 2), "head.bias": torch.rand(3)}


def test_what_was_saved_is_read_back_bit_for_bit(tmp_path):
    measure = Measure("output", "per-sample", 32, shuffle=False)
    path = save_importance(tmp_path / "importance.safetensors", VALUES, measure)
    values, measured = load_importance(path)
    assert measured == measure
    assert values.keys() == VALUES.keys()
    assert all(torch.equal(values[name], VALUES[name]) for name in VALUES)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = save_importance(tmp_path / "importance.safetensors", VALUES, Measure())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UnreadableCheckpoint, match=r"importance\.safetensors"):
        load_importance(path)


def test_a_file_that_is_absent_is_named(tmp_path):
    with pytest.raises(UnreadableCheckpoint, match=r"nowhere\.safetensors"):
        load_importance(tmp_path / "nowhere.safetensors")


def test_a_pickle_is_refused(tmp_path):
    torch.save(VALUES, tmp_path / "importance.pt")
    with pytest.raises(PickleRefused, match="never loads one"):
        load_importance(tmp_path / "importance.pt")


def test_tensors_without_a_measure_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(VALUES, tmp_path / "weights.safetensors")
    with pytest.raises(UnreadableCheckpoint, match="how they were measured"):
        load_importance(tmp_path / "weights.safetensors")


def test_a_header_that_looks_like_a_pickle_is_still_read(tmp_path):
    """The first bytes of a safetensors file are the length of its header, which may be 0x0280."""
    for length in range(300, 640, 8):
        values = {"w" * length: torch.ones(1)}
        path = save_importance(tmp_path / "importance.safetensors", values, Measure())
        if path.read_bytes()[:2] == b"\x80\x02":
            assert load_importance(path)[0].keys() == values.keys()
            return
    pytest.fail("no name gave a header of 640 bytes")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotWrite, match="importance"):
        save_importance(tmp_path / "file" / "importance.safetensors", VALUES, Measure())
