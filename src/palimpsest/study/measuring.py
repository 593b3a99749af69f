"""Seconds and peak memory of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

CLEAR_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Measured:
    """What a piece of work took.

    Attributes:
        seconds: Wall-clock time.
        peak_bytes: Peak memory: of the device on CUDA, of the process where the system can tell
            (Linux); else None.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measuring(device: torch.device) -> Generator[Measured]:
    """Measure the block; the result is filled in when it ends."""
    result = Measured()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    resettable = not cuda and _reset_peak()
    start = time.perf_counter()
    try:
        yield result
    finally:
        if cuda:
            torch.cuda.synchronize(device)
            result.peak_bytes = torch.cuda.max_memory_allocated(device)
        elif resettable:
            result.peak_bytes = _peak()
        result.seconds = time.perf_counter() - start


def _reset_peak() -> bool:
    try:
        CLEAR_PEAK.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
