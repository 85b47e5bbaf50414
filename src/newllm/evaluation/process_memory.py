"""Memory of this process: what it holds now, and its peak since a moment."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import psutil
import torch


def trim_heap() -> None:
    """Gives what is freed back to the system, with glibc: the resident set is then what is in use."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(device: torch.device) -> int:
    """Memory of this process now: resident set on a CPU, torch's allocations on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """`peak_bytes` forgets what was before, on a GPU and on Linux; elsewhere it stays the peak of the whole process."""
    clear = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif clear.is_file():
        clear.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: resident set on a CPU, torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage would count what the parent held when it forked
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
