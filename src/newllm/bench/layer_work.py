"""What the worker of benchmarks does with a single layer."""

from __future__ import annotations

from typing import Any

import torch

from newllm.bench.cumulative_sum import as_cumulative_sum
from newllm.evaluation.process_memory import peak_bytes, reset_peak, resident_bytes, trim_heap
from newllm.evaluation.timing import repeat
from newllm.evaluation.worker import Work
from newllm.models.layers import create_layer
from newllm.models.layers.compressive import CompressiveLayer


class LayerWork(Work):
    """One layer, built by the first command, and its forward passes."""

    def build_layer(
        self, spec: dict[str, Any], cumulative_sum: bool, device: str, threads: int | None, dtype: str
    ) -> dict[str, Any]:
        """Builds one layer for `read_layer`; cumulative_sum: written as in `cumulative_sum.py`."""
        self._start(device, threads)
        layer = create_layer(spec)
        if cumulative_sum:
            assert isinstance(layer, CompressiveLayer)
            layer = as_cumulative_sum(layer)
        self.layer = layer.eval().requires_grad_(False).to(self.device, getattr(torch, dtype))
        return {}

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

        repeat(step, self.device, most=warmup)
        trim_heap()
        resident = resident_bytes(self.device)
        reset_peak(self.device)
        times = repeat(step, self.device, steps)
        return {"seconds": times, "peak_bytes": peak_bytes(self.device) - resident}
