"""Where and in which precision a model is computed: one answer for training, evaluation and every measurement."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from importlib.metadata import version
from typing import Any, Literal

import psutil
import torch

from newllm.errors import UserError
from newllm.resolution import check_threads
from newllm.settings import Precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
HEAP_BYTES = 1 << 30  # of glibc's thresholds
OLD_HEAP_BYTES = 1 << 25  # the most that older versions take for the second


def resolve_device(device: str) -> torch.device:
    """The device of `--device`; 'auto' is cuda where there is one, else cpu."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device is '{device}': it must be auto, cpu or cuda (choose a GPU with CUDA_VISIBLE_DEVICES)"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', but torch finds no CUDA GPU here: use --device cpu or auto")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; elsewhere bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(precision: Precision, device: torch.device) -> Literal["bf16", "float32"]:
    """What `--precision` means here; 'auto' is bf16 where the device computes it natively."""
    if precision == "auto":
        return "bf16" if native_bf16(device) else "float32"
    return precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a forward pass is computed: bf16 autocast, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def prepare_process(threads: int | None) -> None:
    """Applies `--threads`, and keeps freed memory. Results are bit-equal from run to run only for as many threads.

    Raises UserError for more than any machine has: torch would end the process without a word.
    """
    _keep_freed_memory()
    if threads is not None:
        check_threads(threads)
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Lets glibc put tensors below a gigabyte into its heap, and give back nothing but a free end of more than that.

    Else it gives large ones back to the system as soon as they are freed, which then has to clear every page for the
    next: of a training step on a CPU that can be a tenth. What is free below a tensor in use stays with the process.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(M_MMAP_THRESHOLD, HEAP_BYTES) or libc.mallopt(M_MMAP_THRESHOLD, OLD_HEAP_BYTES):
            libc.mallopt(M_TRIM_THRESHOLD, HEAP_BYTES)


def machine_info() -> dict[str, Any]:
    """What the figures of speed and memory were measured on."""
    cpu = torch.device("cpu")
    info = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "native_bf16": native_bf16(cpu),
        "amx": bool(torch.cpu.get_capabilities().get("amx_bf16")),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
    }
    if torch.cuda.is_available():
        info |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return info
