"""A process that does nothing but slices of one model's work, so that its times and its peak memory are its own.

Started by `efficiency.Worker` as `python -m newllm.evaluation.worker`. It reads one JSON object a line from standard
input, {"do": name of a method of Work, **arguments}, and answers each with one JSON line: what the method returned, or
{"error": one line}. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from newllm.evaluation.cache_size import cache_bytes
from newllm.settings import UserError


class Work:
    """One model, built by the first command, and what can be done with it."""

    def build(self, subject: dict[str, Any], device: str, threads: int | None, seed: int = 0) -> dict[str, Any]:
        """Builds the model of `subject`, see `build_model`."""
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.model = build_model(subject).to(self.device)
        self.vocab_size: int = self.model.config.vocab_size  # type: ignore[union-attr, assignment]
        self.optimizer: torch.optim.Optimizer | None = None
        self.cache: Any = None
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "threads": torch.get_num_threads()}

    def train(
        self, batch_size: int, seq_length: int, precision: str, steps: int = 1, seconds: float = 0.0, **ids: str
    ) -> dict[str, Any]:
        """Full training steps: forward, backward, clipping, fused AdamW; at least `steps`, for at least `seconds`.

        ids: path of a .npy file of token ids (ids=…); without it they are random.
        """
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
            self.model.train()
        optimizer = self.optimizer

        def step() -> None:
            tokens = self._tokens(batch_size, seq_length, **ids)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return {"seconds": self._repeat(step, steps, seconds), "peak_bytes": peak_bytes(self.device)}

    def infer(self, dtype: str) -> dict[str, Any]:
        """From here on inference, with the weights in `dtype`."""
        self.optimizer = None
        self.model = self.model.eval().requires_grad_(False).to(getattr(torch, dtype))
        self.model.zero_grad()
        return {}

    @torch.no_grad()
    def prefill(self, context: int, chunk: int | None = None, steps: int = 1, seconds: float = 0.0) -> dict[str, Any]:
        """Reads `context` tokens of one row into an empty cache, `chunk` at a time; the last cache is kept."""

        def step() -> None:
            self.cache = None
            self._read(context, chunk)

        return {"seconds": self._repeat(step, steps, seconds)}

    @torch.no_grad()
    def decode(self, steps: int = 1, seconds: float = 0.0) -> dict[str, Any]:
        """Single tokens after what the cache holds, each with all its logits."""
        return {"seconds": self._repeat(lambda: self._read(1), steps, seconds)}

    @torch.no_grad()
    def measure_cache(self, tokens: int) -> dict[str, Any]:
        """Bytes of a fresh cache of `tokens` tokens, the last of them decoded, so that spare room is counted too."""
        self.cache = None
        self._read(tokens - 1)
        self._read(1)
        measured = cache_bytes(self.cache)
        self.cache = None
        return {"used": measured.used, "allocated": measured.allocated}

    def _read(self, tokens: int, chunk: int | None = None) -> None:
        for ids in self._tokens(1, tokens).split(chunk or tokens, dim=1):
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = output.past_key_values

    def _tokens(self, rows: int, length: int, ids: str | None = None) -> Tensor:
        if ids is None:
            tokens = torch.randint(self.vocab_size, (rows, length))
        else:
            text = np.load(ids, mmap_mode="r")
            starts = torch.randint(len(text) - length, (rows,)).tolist()
            tokens = torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))
        return tokens.to(self.device)

    def _repeat(self, step: Callable[[], None], steps: int, seconds: float) -> list[float]:
        """Seconds of each repetition."""
        times: list[float] = []
        while len(times) < steps or sum(times) < seconds:
            start = time.perf_counter()
            step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times


def build_model(subject: dict[str, Any]) -> nn.Module:
    """The model a subject names.

    {"folder": path, "plugin": file or None} loads a trained one; {"model": preset, "plugin": …, **shape} builds ours;
    {"model": "gpt_neox", "max_positions": n, **shape} builds Hugging Face's own GPT-NeoX in that shape.
    """
    shape = dict(subject)
    plugin = shape.pop("plugin", None)
    if shape.get("model") == "gpt_neox":
        return _gpt_neox(shape)
    from newllm.models import create_model, load_model, load_plugin

    if plugin is not None:
        load_plugin(plugin)
    if "folder" in shape:
        return load_model(shape["folder"])
    return create_model(shape.pop("model"), **shape)


def _gpt_neox(shape: dict[str, Any]) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            intermediate_size=shape["intermediate_size"],
            max_position_embeddings=shape["max_positions"],
        )
    )


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
