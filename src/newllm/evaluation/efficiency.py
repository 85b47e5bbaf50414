"""Speed and memory of models, measured in processes of their own that work in turn.

Every model gets a worker process (`worker.py`). The driver lets one worker at a time do a small slice of its work,
round by round, and takes medians: what else happens on the machine meets all models alike. An idle worker waits in a
read and costs nothing (torch's threads sleep a few milliseconds after their last work).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from newllm.devices import resolve_device, resolve_precision
from newllm.evaluation.processes import Worker, WorkerError
from newllm.evaluation.timing import mean_of_medians
from newllm.settings import CommonSettings, LaggedSettings

ROUNDS = 3
# How the time of `efficiency_seconds` is divided.
SHARES = {"train": 0.6, "prefill": 0.15, "decode": 0.25}
KEYS = (
    "train_tokens_per_second",
    "peak_memory_bytes",
    "prefill_ms",
    "prefill_tokens",
    "decode_ms_per_token",
    "cache_bytes_per_token",
    "cache_bytes_allocated_per_token",
    "state_bytes",
    "decode_context",
    "decode_dtype",
    "efficiency_error",
)


def measure_all(folders: list[Path], settings: CommonSettings) -> list[dict[str, Any]]:
    """Speed, memory and cache bytes of trained models; in the order of `folders`.

    Training: full steps at batch_size × seq_length in the run's precision; of a model that feeds a state back the steps
    by which it was trained, as in its second epoch and later, deeper ones by their share. Inference: batch 1 at
    `decode_context` tokens, weights and cache in bf16 if that is the run's precision, else in float32 (`decode_dtype`).

    Args:
        folders: run folders or model folders.
        settings: resolved settings; about `efficiency_seconds` are spent on each model, its start not counted.

    Returns:
        for each model a dict of KEYS. Times are medians; what the cache costs is explained at `cache_figures`. If a
        measurement fails, `efficiency_error` says why in one line, and the figures not reached are None.
    """
    measurements = [Measurement(folder, settings) for folder in folders]
    waiting = list(measurements)
    while waiting:
        group = _start_those_that_fit(waiting)
        try:
            for phase in (Measurement.train, Measurement.prepare_inference, Measurement.infer):
                for _ in range(1 if phase is Measurement.prepare_inference else ROUNDS):
                    for measurement in group:
                        measurement.attempt(phase)
        finally:
            for measurement in group:
                measurement.end()
        waiting = waiting[len(group) :]
    return [measurement.result for measurement in measurements]


def cache_figures(measured: dict[int, dict[str, int]]) -> dict[str, float]:
    """What grows with the context and what does not.

    Args:
        measured: bytes used and allocated at about half of the context, three quarters, and all of it, by tokens.

    Returns:
        cache_bytes_per_token is the growth from half of the context to all of it, state_bytes the rest: 0 and all bytes
        for a state that no longer grows, such as a short window. If the growth changes in between, as where a window
        fills up, no line describes it: then cache_bytes_per_token is all bytes divided by all tokens, state_bytes 0.
    """
    (half, low), (middle, between), (full, high) = measured.items()
    grown = high["used"] - low["used"]
    if grown * (middle - half) == (between["used"] - low["used"]) * (full - half):
        per_token = grown / (full - half)
        allocated = (high["allocated"] - low["allocated"]) / (full - half)
    else:
        per_token, allocated = high["used"] / full, high["allocated"] / full
    return {
        "cache_bytes_per_token": per_token,
        "cache_bytes_allocated_per_token": allocated,
        "state_bytes": high["used"] - per_token * full,
    }


def _start_those_that_fit(waiting: list[Measurement]) -> list[Measurement]:
    """Starts workers until the next one might not fit into memory: only those started together can work in turn."""
    group: list[Measurement] = []
    largest = 0
    for measurement in waiting:
        if group and psutil.virtual_memory().available < 1.5 * largest:
            break
        group.append(measurement)
        measurement.attempt(Measurement.begin)
        largest = max(largest, measurement.result["peak_memory_bytes"] or 0)
    return group


class Measurement:
    """What is measured of one model, phase by phase."""

    def __init__(self, folder: Path, settings: CommonSettings) -> None:
        self.folder, self.settings = folder, settings
        self.result: dict[str, Any] = dict.fromkeys(KEYS)
        self.worker: Worker | None = None
        self.times: dict[str, list[float]] = {phase: [] for phase in (*SHARES, "train_deep")}
        self.recurrence: dict[str, Any] | None = None

    def attempt(self, phase: Callable[[Measurement], None]) -> None:
        """Runs a phase; after a failure, which is noted in the result, no other."""
        if self.result["efficiency_error"] is None:
            try:
                phase(self)
            except WorkerError as error:
                self.result["efficiency_error"] = str(error)

    def begin(self) -> None:
        """Loads the model and takes one training step, which is not counted: it allocates what later ones reuse."""
        device = resolve_device(self.settings.device)
        self.precision = resolve_precision(self.settings.precision, device)
        self.worker = Worker(str(self.folder))
        built = self.worker.call(
            "build",
            subject={"folder": str(self.folder), "plugin": self.settings.plugin},
            device=device.type,
            threads=self.settings.threads,
        )
        if built["recurrent"]:
            self.recurrence = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(LaggedSettings)}
        self._train_slice(0, warmup=0)

    def train(self) -> None:
        for phase, times in self._train_slice(self._slice("train")).items():
            self.times[phase] += times
        usual, rare = self.times["train"], self.times["train_deep"]
        seconds = mean_of_medians(usual, rare or usual, self.settings.lagged_deep_share if rare else 0.0)
        tokens = self.settings.batch_size * self.settings.seq_length  # type: ignore[operator]
        self.result["train_tokens_per_second"] = tokens / seconds

    def _train_slice(self, seconds: float, warmup: int = 1) -> dict[str, list[float]]:
        """Seconds of steps of each kind that the run takes, together for so long; notes the peak.

        The first step after another process has worked finds cold caches: it is not counted.
        """
        step: dict[str, Any] = {"batch_size": self.settings.batch_size, "seq_length": self.settings.seq_length}
        step |= {"precision": self.precision, "recurrence": self.recurrence}
        kinds = {"train": False} | ({"train_deep": True} if self._has_deep_steps() else {})
        times = {}
        for phase, deep in kinds.items():
            answer = self._call("train", **step, deep=deep, seconds=seconds / len(kinds), warmup=warmup)
            times[phase] = answer["seconds"]
            self.result["peak_memory_bytes"] = answer["peak_bytes"]
        return times

    def _has_deep_steps(self) -> bool:
        return bool(self.recurrence and self.settings.lagged_deep_share and not self.settings.step_by_step)

    def prepare_inference(self) -> None:
        """Casts the weights, and reads the bytes of the cache at three lengths."""
        context: int = self.settings.decode_context  # type: ignore[assignment]
        dtype = "bfloat16" if self.precision == "bf16" else "float32"
        self._call("infer", dtype=dtype)
        lengths = (context // 2, context - context // 4, context)
        self.result |= cache_figures({tokens: self._call("measure_cache", tokens=tokens) for tokens in lengths})
        self.result |= {"decode_dtype": dtype, "decode_context": context, "prefill_tokens": context}

    def infer(self) -> None:
        """Prefill, then single tokens after it; the first of them, which makes the cache grow, is not counted."""
        prefill = self._call("prefill", context=self.settings.decode_context, seconds=self._slice("prefill"))
        self.times["prefill"] += prefill["seconds"]
        self._call("decode")
        self.times["decode"] += self._call("decode", seconds=self._slice("decode"))["seconds"]
        self.result["prefill_ms"] = 1000 * statistics.median(self.times["prefill"])
        self.result["decode_ms_per_token"] = 1000 * statistics.median(self.times["decode"])

    def end(self) -> None:
        if self.worker is not None:
            self.worker.close()

    def _call(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self.worker is not None
        return self.worker.call(command, **arguments)

    def _slice(self, phase: str) -> float:
        """Seconds of a phase's slice in one round."""
        return self.settings.efficiency_seconds * SHARES[phase] / ROUNDS
