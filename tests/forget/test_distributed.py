from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.forget.distributed_unlearning import unlearned

ROOT = Path(__file__).parents[2]


def launched(place: Path, rule: str) -> dict[str, torch.Tensor]:
    """The weights that two processes over gloo come to, started as `accelerate launch` starts them."""
    file = place / f"{rule}.safetensors"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(ROOT / "tests/forget/distributed_unlearning.py"), str(file), rule,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=place, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with safe_open(file, "pt") as stored:
        assert stored.metadata()["processes"] == "2"
    return load_file(file)


def test_two_processes_make_the_update_of_one(tmp_path: Path):
    together, alone = launched(tmp_path, "sum"), unlearned("sum")
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-5, rtol=1e-4), name


@pytest.mark.slow
def test_a_rule_on_two_gradients_works_over_processes(tmp_path: Path):
    together, alone = launched(tmp_path, "gu"), unlearned("gu")
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-4, rtol=1e-3), name
