"""A process that does nothing but slices of one model's work, so that its times and its peak memory are its own.

Started by `processes.Worker` as `python -m newllm.evaluation.worker`. It reads one JSON object a line from standard
input, {"do": name of a method of Work, **arguments}, and answers each with one JSON line: what the method returned, or
{"error": one line}. It ends with its input.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from newllm.evaluation.cache_size import cache_bytes
from newllm.evaluation.layer_work import LayerWork
from newllm.evaluation.process_memory import peak_bytes, reset_peak, resident_bytes, trim_heap
from newllm.evaluation.rivals import build_rival, rival_cache
from newllm.evaluation.stream import Stream, fill, repeated
from newllm.settings import UserError

if TYPE_CHECKING:
    from newllm.evaluation.lagged_work import LaggedSteps


class Work(LayerWork):
    """One model, built by the first command, and what can be done with it."""

    def build(self, subject: dict[str, Any], device: str, threads: int | None, seed: int = 0) -> dict[str, Any]:
        """Builds the model of `subject`, see `build_model`."""
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.rival: str | None = subject.get("rival")
        self.model = build_model(subject).to(self.device)
        self.vocab_size: int = self.model.config.vocab_size  # type: ignore[union-attr, assignment]
        self.optimizer: torch.optim.Optimizer | None = None
        self.cache: Any = None
        self.lagged: LaggedSteps | None = None
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "threads": torch.get_num_threads(),
            "recurrent": bool(getattr(self.model, "state_size", 0)),  # a rival has none
        }

    def train(
        self,
        batch_size: int,
        seq_length: int,
        precision: str,
        steps: int = 1,
        seconds: float = 0.0,
        warmup: int = 0,
        recurrence: dict[str, Any] | None = None,
        deep: bool = False,
        **ids: str,
    ) -> dict[str, Any]:
        """Full training steps: forward, backward, clipping, fused AdamW; at least `steps`, for at least `seconds`.

        Args:
            warmup: steps before, which are not counted.
            recurrence: how a model that feeds a state back is trained, as settings of a run.
            deep: these are its deeper steps.
            ids: path of a .npy file of token ids (ids=…); without it they are random.
        """
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
            self.model.train()
        optimizer = self.optimizer
        if recurrence is not None and not recurrence["step_by_step"] and self.lagged is None:
            from newllm.evaluation.lagged_work import LaggedSteps

            self.lagged = LaggedSteps(self.model, batch_size, seq_length, recurrence)  # type: ignore[arg-type]

        def step() -> None:
            tokens = self._tokens(batch_size, seq_length, **ids)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                if self.lagged is None:
                    loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
                else:
                    loss = self.lagged.loss(tokens, deep)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        self._repeat(step, most=warmup)
        return {"seconds": self._repeat(step, steps, seconds), "peak_bytes": peak_bytes(self.device)}

    def discrete(
        self, batch_size: int, seq_length: int, precision: str, steps: int = 1, warmup: int = 0, **ids: str
    ) -> dict[str, Any]:
        """The forward pass that goes before the first step on a batch of windows, by Lagged Cache Training.

        Args as of `train`, which says how: it comes first.
        """
        assert self.lagged is not None
        lagged = self.lagged

        def step() -> None:
            tokens = self._tokens(batch_size, seq_length, **ids)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                lagged.discrete(tokens)

        self._repeat(step, most=warmup)
        return {"seconds": self._repeat(step, steps)}

    def infer(self, dtype: str) -> dict[str, Any]:
        """From here on inference, with the weights in `dtype`."""
        self.optimizer = None
        self.model = self.model.eval().requires_grad_(False).to(getattr(torch, dtype))
        self.model.zero_grad()
        return {}

    @torch.no_grad()
    def prefill(self, context: int, steps: int = 1, seconds: float = 0.0) -> dict[str, Any]:
        """Reads `context` tokens of one row into an empty cache; the last cache is kept."""

        def step() -> None:
            self.cache = None
            self._read(1, context)

        return {"seconds": self._repeat(step, steps, seconds)}

    @torch.no_grad()
    def decode(self, steps: int = 1, seconds: float = 0.0) -> dict[str, Any]:
        """Single tokens after what the cache of `prefill` holds, each with all its logits."""
        return {"seconds": self._repeat(lambda: self._read(1, 1), steps, seconds)}

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
        self._repeat(lambda: self._read(rows, 1), seconds=seconds, most=warmup)
        times = self._repeat(lambda: self._read(rows, 1), seconds=seconds, most=steps)
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
    def measure_cache(self, tokens: int) -> dict[str, Any]:
        """Bytes of a fresh cache of `tokens` tokens, the last of them decoded, so that spare room is counted too."""
        self.cache = None
        self._read(1, tokens - 1)
        self._read(1, 1)
        measured = cache_bytes(self.cache)
        self.cache = None
        return {"used": measured.used, "allocated": measured.allocated}

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
        self._repeat(self.stream.decode, most=warmup)
        times = self._repeat(self.stream.decode, steps)
        measured = cache_bytes(self.stream.cache)
        peak = peak_bytes(self.device)
        self.stream.empty()
        return {"seconds": times, "peak_bytes": peak} | measured._asdict()

    def bandwidth(self, device: str, threads: int | None, megabytes: int, seconds: float) -> dict[str, Any]:
        """The fastest that this device reads memory, in bytes per second: the best of several reductions of a buffer.

        megabytes: size of the buffer, which must be much larger than the last cache between memory and processor.
        """
        self.device = torch.device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        buffer = torch.ones(megabytes * 2**20 // 4, device=self.device)
        reductions = (torch.sum, torch.amax, torch.linalg.vector_norm)
        times = [
            self._repeat(functools.partial(reduction, buffer), seconds=seconds / len(reductions))
            for reduction in reductions
        ]
        return {"bytes_per_second": buffer.nbytes / min(map(min, times))}

    def _read(self, rows: int, tokens: int) -> None:
        ids = self._tokens(rows, tokens)
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values

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
            for state, sample in zip(self.cache.layers, read.layers, strict=True):
                fill(state, sample, rows, context)
        else:
            read = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            self.cache = rival_cache(self.rival, self.model, capacity)
            for layer, sample in zip(self.cache.layers, read.layers, strict=True):
                layer.update(*(repeated(tensor, rows, context) for tensor in (sample.keys, sample.values)))

    def _tokens(self, rows: int, length: int, ids: str | None = None) -> Tensor:
        if ids is None:
            tokens = torch.randint(self.vocab_size, (rows, length))
        else:
            text = np.load(ids, mmap_mode="r")
            starts = torch.randint(len(text) - length, (rows,)).tolist()
            tokens = torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))
        return tokens.to(self.device)


def build_model(subject: dict[str, Any]) -> nn.Module:
    """The model a subject names.

    {"folder": path, "plugin": file or None} loads a trained one; {"model": preset, "plugin": …, **shape} builds ours;
    {"rival": one of `rivals.NAMES`, "max_positions": n, "kv_lora_rank": r, **shape} builds one of Hugging Face's.
    """
    shape = dict(subject)
    plugin = shape.pop("plugin", None)
    if "rival" in shape:
        return build_rival(shape.pop("rival"), **shape)
    from newllm.models import create_model, load_model, load_plugin

    if plugin is not None:
        load_plugin(plugin)
    if "folder" in shape:
        return load_model(shape["folder"])
    return create_model(shape.pop("model"), **shape)


def weight_bytes(model: nn.Module, rows: int) -> int:
    """Bytes of weights that a decoding step reads: all, but of the input embedding only a row for each token."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding is model.get_output_embeddings().weight:  # type: ignore[operator]
        return total
    return total - embedding.nbytes + rows * embedding[0].nbytes


def main() -> None:
    # Answers go to the pipe that was standard output; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = Work()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(work, command.pop("do"))(**command)
        except Exception as error:  # whatever it is, the driver reports it in one line
            text = " ".join(str(error).split())
            answer = {"error": text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
