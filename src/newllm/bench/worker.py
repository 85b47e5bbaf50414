"""The worker of benchmarks: it also builds rivals, fills caches in a moment, reads long texts and single layers.

Started by `rounds.BenchWorker` as `python -m newllm.bench.worker`; it speaks as `newllm.evaluation.worker` does.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import nn

from newllm.bench.layer_work import LayerWork
from newllm.bench.rivals import build_rival, rival_cache
from newllm.bench.stream import Stream, fill, repeated
from newllm.evaluation.cache_size import cache_bytes
from newllm.evaluation.process_memory import peak_bytes, reset_peak, resident_bytes, trim_heap
from newllm.evaluation.timing import repeat
from newllm.evaluation.worker import build_model, serve


class BenchWork(LayerWork):
    """One model, a rival or a layer, built by the first command, and what benchmarks do with it."""

    def _build_model(self, subject: dict[str, Any]) -> nn.Module:
        self.rival: str | None = subject.get("rival")
        return build_subject(subject)

    def discrete(
        self, batch_size: int, seq_length: int, precision: str, steps: int = 1, warmup: int = 0, ids: str | None = None
    ) -> dict[str, Any]:
        """The forward pass that goes before the first step on a batch of windows, by Lagged Cache Training.

        Args as of `train`, which says how: it comes first.
        """
        assert self.lagged is not None
        lagged = self.lagged

        def step() -> None:
            tokens = self._tokens(batch_size, seq_length, ids)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                lagged.discrete(tokens)

        repeat(step, self.device, most=warmup)
        return {"seconds": repeat(step, self.device, steps)}

    @torch.no_grad()
    def decode_filled(
        self, dtype: str, rows: int, context: int, chunk: int, warmup: int, steps: int, seconds: float
    ) -> dict[str, Any]:
        """Fills a cache (see `_fill`), decodes one token a step in each row with all logits, and drops the cache.

        Args:
            warmup: steps before, not counted: the first touches cold memory, loads kernels, makes the cache grow.
            steps: at most so many, and so many of the warm-up.
            seconds: each of the two ends after this time, but not before its first step.

        Returns:
            seconds of each step; weight_bytes and cache_bytes, what a step cannot do without reading.
        """
        self.infer(dtype)
        self._fill(rows, context, chunk, context + warmup + steps)
        repeat(lambda: self._read(rows, 1), self.device, seconds=seconds, most=warmup)
        times = repeat(lambda: self._read(rows, 1), self.device, seconds=seconds, most=steps)
        read = {"weight_bytes": weight_bytes(self.model, rows), "cache_bytes": cache_bytes(self.cache).used}
        self.cache = None
        return {"seconds": times} | read

    @torch.no_grad()
    def decode_memory(self, dtype: str, context: int, chunk: int, steps: int) -> dict[str, Any]:
        """Memory while the last `steps` of `context` tokens of one row are decoded.

        Returns:
            resident_bytes before there was a cache; peak_bytes while decoding; cache bytes used and allocated at the
            end.
        """
        self.infer(dtype)
        short = min(chunk, context - steps)
        self._fill(1, short, short, short + 1)
        self._read(1, 1)  # the two allocate what stays: work space, the pages of code that is used
        self.cache = None
        trim_heap()
        resident = resident_bytes(self.device)
        self._fill(1, context - steps, chunk, context)
        trim_heap()
        reset_peak(self.device)
        for _ in range(steps):
            self._read(1, 1)
        measured = cache_bytes(self.cache)
        peak = peak_bytes(self.device)
        self.cache = None
        return {"resident_bytes": resident, "peak_bytes": peak} | measured._asdict()

    @torch.no_grad()
    def start_stream(self, dtype: str, chunk: int, ids: str) -> dict[str, Any]:
        """Begins to read a long text, token ids in a .npy file, `chunk` tokens at a time; then `grow` goes on.

        Returns:
            resident_bytes before there is a state.
        """
        self.infer(dtype)
        # One stream is read and dropped: what it allocates and stays, such as work space, is no state.
        warm = Stream(self.model, np.load(ids), chunk)
        warm.read(chunk)
        warm.fill()
        warm.decode()
        del warm
        self.stream = Stream(self.model, np.load(ids), chunk)
        trim_heap()
        return {"resident_bytes": resident_bytes(self.device)}

    @torch.no_grad()
    def grow(self, tokens: int, warmup: int, steps: int) -> dict[str, Any]:
        """Reads on until `tokens` tokens are read; decodes the last of them, one at a time.

        warmup: tokens decoded before, not counted.

        Returns:
            seconds of each of `steps` tokens; used and allocated bytes of the state at the end; peak_bytes meanwhile.
        """
        self.stream.read(tokens - warmup - steps)
        self.stream.fill()
        trim_heap()
        reset_peak(self.device)
        repeat(self.stream.decode, self.device, most=warmup)
        times = repeat(self.stream.decode, self.device, steps)
        measured = cache_bytes(self.stream.cache)
        peak = peak_bytes(self.device)
        self.stream.empty()
        return {"seconds": times, "peak_bytes": peak} | measured._asdict()

    def bandwidth(self, device: str, threads: int | None, megabytes: int, seconds: float) -> dict[str, Any]:
        """The fastest that this device reads memory, in bytes per second: the best of several reductions of a buffer.

        megabytes: size of the buffer, which must be much larger than the last cache between memory and processor.
        """
        self._start(device, threads)
        buffer = torch.ones(megabytes * 2**20 // 4, device=self.device)
        reductions = (torch.sum, torch.amax, torch.linalg.vector_norm)
        times = [
            repeat(functools.partial(reduction, buffer), self.device, seconds=seconds / len(reductions))
            for reduction in reductions
        ]
        return {"bytes_per_second": buffer.nbytes / min(map(min, times))}

    def _fill(self, rows: int, context: int, chunk: int, capacity: int) -> None:
        """A cache of `context` tokens in `rows` rows, made in a moment: reading 32k tokens would take minutes.

        What `chunk` tokens of one row leave in a cache is appended again and again, in all rows, see `fill`. The bytes,
        the spare room and the time of a step depend on the length alone. `capacity` is what a static cache is allocated
        for.
        """
        ids = self._tokens(1, min(chunk, context))
        if self.rival is None:
            # At the model's precision, since what is appended to a quantised cache is what the layers computed.
            read, self.cache = self.model.make_cache(precision="model"), self.model.make_cache()  # type: ignore[operator]
            self.model(input_ids=ids, past_key_values=read, logits_to_keep=1)
            for state, sample in zip(self.cache.parts(), read.parts(), strict=True):
                fill(state, sample, rows, context)
        else:
            read = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            self.cache = rival_cache(self.rival, self.model, capacity)
            for layer, sample in zip(self.cache.layers, read.layers, strict=True):
                layer.update(*(repeated(tensor, rows, context) for tensor in (sample.keys, sample.values)))


def build_subject(subject: dict[str, Any]) -> nn.Module:
    """The model or rival a subject names.

    {"rival": one of `rivals.NAMES`, "max_positions": n, "kv_lora_rank": r, **shape} builds one of Hugging Face's; for
    the others see `build_model`.
    """
    if "rival" not in subject:
        return build_model(subject)
    options = dict(subject)
    return build_rival(options.pop("rival"), **options)


def weight_bytes(model: nn.Module, rows: int) -> int:
    """Bytes of weights that a decoding step reads: all, but of the input embedding only a row for each token."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding is model.get_output_embeddings().weight:  # type: ignore[operator]
        return total
    return total - embedding.nbytes + rows * embedding[0].nbytes


if __name__ == "__main__":
    serve(BenchWork())
