"""What a worker does with a single layer, and how it times anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from newllm.evaluation.cumulative_sum import as_cumulative_sum
from newllm.evaluation.process_memory import peak_bytes, reset_peak, resident_bytes, trim_heap
from newllm.models.layers import create_layer
from newllm.models.layers.compressive import CompressiveLayer


class LayerWork:
    """One layer, built by the first command, and its forward passes."""

    device: torch.device

    def build_layer(
        self, spec: dict[str, Any], cumulative_sum: bool, device: str, threads: int | None, dtype: str, seed: int = 0
    ) -> dict[str, Any]:
        """Builds one layer for `read_layer`; cumulative_sum: written as in `cumulative_sum.py`."""
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.device = torch.device(device)
        layer = create_layer(spec)
        if cumulative_sum:
            assert isinstance(layer, CompressiveLayer)
            layer = as_cumulative_sum(layer)
        self.layer = layer.eval().requires_grad_(False).to(self.device, getattr(torch, dtype))
        return {"parameters": sum(p.numel() for p in layer.parameters())}

    @torch.no_grad()
    def read_layer(self, rows: int, length: int, warmup: int, steps: int) -> dict[str, Any]:
        """Forward passes of the layer over whole rows of random embeddings, which are made and dropped here.

        Returns:
            seconds of each of `steps` passes, `warmup` more before them; peak_bytes during these over what is resident
            with the embeddings.
        """
        weight = next(self.layer.parameters())
        x = torch.randn(rows, length, self.layer.spec["hidden_size"], device=self.device, dtype=weight.dtype)
        positions = torch.arange(length, device=self.device).expand(rows, length)

        def step() -> None:
            self.layer(x, positions=positions, mask=None, state=None)

        self._repeat(step, most=warmup)
        trim_heap()
        resident = resident_bytes(self.device)
        reset_peak(self.device)
        times = self._repeat(step, steps)
        return {"seconds": times, "peak_bytes": peak_bytes(self.device) - resident}

    def _repeat(
        self, step: Callable[[], object], steps: int = 1, seconds: float = 0.0, most: float = math.inf
    ) -> list[float]:
        """Seconds of each repetition: at least `steps`, for at least `seconds`, but never more than `most`."""
        times: list[float] = []
        while len(times) < most and (len(times) < steps or sum(times) < seconds):
            start = time.perf_counter()
            step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times
