"""A process that does nothing but slices of one model's work, so that its times and its peak memory are its own.

Started by `processes.Worker` as `python -m newllm.evaluation.worker`. It reads one JSON object a line from standard
input, {"do": name of a method of Work, **arguments}, and answers each with one JSON line: what the method returned, or
{"error": one line}. It ends with its input. Benchmarks have a worker that can do more, `newllm.bench.worker`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from newllm.devices import prepare_process
from newllm.errors import UserError
from newllm.evaluation.cache_size import cache_bytes
from newllm.evaluation.process_memory import peak_bytes
from newllm.evaluation.timing import repeat
from newllm.models import TransformerLM, create_model, load_model, load_plugin

if TYPE_CHECKING:
    from newllm.evaluation.lagged_work import LaggedSteps


class Work:
    """One model, built by the first command, and what can be done with it."""

    def build(self, subject: dict[str, Any], device: str, threads: int | None) -> dict[str, Any]:
        """Builds the model of `subject`, see `build_model`."""
        self._start(device, threads)
        self.model = self._build_model(subject).to(self.device)
        self.vocab_size: int = self.model.config.vocab_size  # type: ignore[union-attr, assignment]
        self.optimizer: torch.optim.Optimizer | None = None
        self.cache: Any = None
        self.lagged: LaggedSteps | None = None
        return {"recurrent": bool(getattr(self.model, "state_size", 0))}  # Hugging Face's have none

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
        ids: str | None = None,
    ) -> dict[str, Any]:
        """Full training steps: forward, backward, clipping, fused AdamW; at least `steps`, for at least `seconds`.

        Args:
            warmup: steps before, which are not counted.
            recurrence: how a model that feeds a state back is trained, as settings of a run.
            deep: these are its deeper steps.
            ids: path of a .npy file of token ids; without it they are random.
        """
        if self.optimizer is None:
            if isinstance(self.model, TransformerLM):
                self.model.freeze_first_phase()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
            self.model.train()
        optimizer = self.optimizer
        if recurrence is not None and not recurrence["step_by_step"] and self.lagged is None:
            from newllm.evaluation.lagged_work import LaggedSteps

            self.lagged = LaggedSteps(self.model, batch_size, seq_length, recurrence)  # type: ignore[arg-type]

        def step() -> None:
            tokens = self._tokens(batch_size, seq_length, ids)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                if self.lagged is None:
                    loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
                else:
                    loss = self.lagged.loss(tokens, deep)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        repeat(step, self.device, most=warmup)
        return {"seconds": repeat(step, self.device, steps, seconds), "peak_bytes": peak_bytes(self.device)}

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

        return {"seconds": repeat(step, self.device, steps, seconds)}

    @torch.no_grad()
    def decode(self, steps: int = 1, seconds: float = 0.0) -> dict[str, Any]:
        """Single tokens after what the cache of `prefill` holds, each with all its logits."""
        return {"seconds": repeat(lambda: self._read(1, 1), self.device, steps, seconds)}

    @torch.no_grad()
    def measure_cache(self, tokens: int) -> dict[str, Any]:
        """Bytes of a fresh cache of `tokens` tokens, the last of them decoded, so that spare room is counted too."""
        self.cache = None
        self._read(1, tokens - 1)
        self._read(1, 1)
        measured = cache_bytes(self.cache)
        self.cache = None
        return {"used": measured.used, "allocated": measured.allocated}

    def _start(self, device: str, threads: int | None) -> None:
        self.device = torch.device(device)
        prepare_process(threads)
        torch.manual_seed(0)

    def _build_model(self, subject: dict[str, Any]) -> nn.Module:
        return build_model(subject)

    def _read(self, rows: int, tokens: int) -> None:
        ids = self._tokens(rows, tokens)
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


def build_model(subject: dict[str, Any]) -> nn.Module:
    """The model a subject names.

    {"folder": path, "plugin": file or None} loads a trained one; {"model": preset, "plugin": …, **shape} builds ours.
    """
    shape = dict(subject)
    plugin = shape.pop("plugin", None)
    if plugin is not None:
        load_plugin(plugin)
    if "folder" in shape:
        return load_model(shape["folder"])
    return create_model(shape.pop("model"), **shape)


def serve(work: Work) -> None:
    """Does what standard input says until it ends."""
    # Answers go to the pipe that was standard output; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(work, command.pop("do"))(**command)
        except Exception as error:  # whatever it is, the driver reports it in one line
            text = " ".join(str(error).split())
            answer = {"error": text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Work())
