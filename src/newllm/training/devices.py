"""Where and in which precision a model is computed: one answer for training, evaluation and every measurement."""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import accelerate
import psutil
import torch
import transformers

from newllm.settings import CommonSettings, UserError


def resolve_device(settings: CommonSettings) -> torch.device:
    """The device of `--device`; 'auto' is cuda where there is one, else cpu."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device is '{settings.device}': it must be auto, cpu or cuda (choose a GPU with CUDA_VISIBLE_DEVICES)"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', but torch finds no CUDA GPU here: use --device cpu or auto")
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; elsewhere bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(settings: CommonSettings, device: torch.device) -> str:
    """'bf16' or 'float32'; 'auto' is bf16 where the device computes it natively."""
    if settings.precision == "auto":
        return "bf16" if native_bf16(device) else "float32"
    return settings.precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a forward pass is computed: bf16 autocast, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def set_threads(settings: CommonSettings) -> None:
    """Applies `--threads`. Results are bit-equal from run to run only for the same number of threads."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)


def machine_info() -> dict[str, Any]:
    """What the figures of speed and memory were measured on."""
    cpu = torch.device("cpu")
    info = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "native_bf16": native_bf16(cpu),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    if torch.cuda.is_available():
        info |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return info
