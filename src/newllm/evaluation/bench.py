"""This project's models against Hugging Face's GPT-NeoX in the same shape: training, and decoding one row.

Each side is a process of its own (`worker.py`); they work in turn, round by round. A case is measured against the
reference in the same round, so that the ratio of a round is a ratio under the same load; reported are medians over all
repetitions, their ratio, and the lowest and highest ratio of a round.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from newllm.evaluation.efficiency import Worker
from newllm.settings import DataSettings, Precision, RunSettings, UserError, resolve

REFERENCE = "gpt_neox"


@dataclass(kw_only=True)
class BenchSettings:
    """What both benchmarks share; the default shape is Pythia-70M's."""

    models: list[str] = field(default_factory=lambda: ["pythia"])
    """Presets or layer types of this project to measure."""
    hidden_size: int = 512
    """Width D of the residual stream."""
    num_layers: int = 6
    """Number of layers."""
    num_heads: int = 8
    """Number of attention heads."""
    intermediate_size: int = 2048
    """Width of the MLP."""
    vocab_size: int = 50304
    """Words of the vocabulary."""
    rounds: int = 5
    """Rounds; in each, every model works once."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    device: str = "auto"
    """'auto' is cuda where there is one, else cpu."""

    def subject(self, model: str, max_positions: int) -> dict[str, Any]:
        """What `worker.build_model` needs to build a model in this shape."""
        names = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
        subject = {"model": model} | {name: getattr(self, name) for name in names}
        return subject | {"max_positions": max_positions} if model == REFERENCE else subject


@dataclass(kw_only=True)
class TrainBench(BenchSettings):
    """`newllm bench train`."""

    batch_size: int = 8
    """Windows in a batch."""
    seq_lengths: list[int] = field(default_factory=lambda: [128, 512])
    """Tokens of a window; one case for each."""
    steps: int = 2
    """Training steps of a model in a round."""
    precision: Precision = "auto"
    """'auto' is bf16 autocast where the device computes it natively, else float32."""


@dataclass(kw_only=True)
class DecodeBench(BenchSettings):
    """`newllm bench decode`."""

    contexts: list[int] = field(default_factory=lambda: [2048, 8192])
    """Tokens in the cache when decoding begins; one case for each."""
    steps: int = 20
    """Tokens a model decodes in a round."""
    prefill_chunk: int = 512
    """Tokens read at once when the cache is filled, which bounds the memory of the attention scores."""


def bench_train(settings: TrainBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Full training steps of every model and the reference.

    Returns:
        {"machine", "settings", "cases": [{"batch_size", "seq_length", "rows": [row …]}]}; a row has model,
        tokens_per_second, peak_bytes, and towards the reference speed_ratio, speed_ratio_range, memory_ratio.
    """
    device, precision = _device_and_precision(settings, settings.precision)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        ids = _text_ids(Path(folder), settings.vocab_size, progress)
        for length in settings.seq_lengths:
            label = f"train {settings.batch_size} × {length}"
            step: dict[str, Any] = {
                "batch_size": settings.batch_size,
                "seq_length": length,
                "precision": precision,
                "ids": ids,
            }
            with contextlib.ExitStack() as stack:
                progress(f"{label}: starting")
                models = [REFERENCE, *settings.models]
                workers = _start(stack, settings, models, models, length, device)
                for worker in workers:
                    worker.call("train", **step)  # allocates what later steps reuse
                step["steps"] = settings.steps
                answers = _in_turn(workers, settings.rounds, progress, label, "train", **step)
            rows = _rows(workers, [[answer["seconds"] for answer in per_round] for per_round in answers])
            for row, per_round in zip(rows, answers, strict=True):
                row["tokens_per_second"] = settings.batch_size * length / row["seconds"]
                row["peak_bytes"] = per_round[-1]["peak_bytes"]
                row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
            cases.append({"batch_size": settings.batch_size, "seq_length": length, "rows": rows})
    return {"benchmark": "train", "precision": precision} | _described(settings, cases)


def bench_decode(settings: DecodeBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds a token, batch 1, of every model and the reference, each in bf16 and in float32.

    Both caches are filled by reading random tokens. Speed ratios are towards the reference in the better of its two
    precisions in that case.
    """
    device, _ = _device_and_precision(settings, "auto")
    cases = []
    for context in settings.contexts:
        label = f"decode after {context:,} tokens"
        longest = context + 2 + settings.rounds * settings.steps
        with contextlib.ExitStack() as stack:
            progress(f"{label}: starting")
            models, dtypes = zip(
                *itertools.product([REFERENCE, *settings.models], ["bfloat16", "float32"]), strict=True
            )
            names = [f"{model} {dtype}" for model, dtype in zip(models, dtypes, strict=True)]
            workers = _start(stack, settings, names, models, longest, device)
            prefills = []
            for worker, dtype in zip(workers, dtypes, strict=True):
                progress(f"{label}: {worker.name} fills its cache")
                worker.call("infer", dtype=dtype)
                prefills.append(worker.call("prefill", context=context, chunk=settings.prefill_chunk)["seconds"][0])
                worker.call("decode", steps=2)  # makes the cache grow once
            answers = _in_turn(workers, settings.rounds, progress, label, "decode", steps=settings.steps)
        seconds = [[answer["seconds"] for answer in per_round] for per_round in answers]
        better = min((0, 1), key=lambda n: _median(seconds[n]))  # the reference in its two precisions comes first
        rows = _rows(workers, seconds, reference=better)
        for row, dtype, prefill in zip(rows, dtypes, prefills, strict=True):
            row |= {"dtype": dtype, "ms_per_token": 1000 * row["seconds"], "prefill_ms": 1000 * prefill}
        cases.append({"context": context, "reference": rows[better]["model"], "rows": rows})
    return {"benchmark": "decode"} | _described(settings, cases)


def _device_and_precision(settings: BenchSettings, precision: Precision) -> tuple[str, str]:
    from newllm.models import check_model_spec
    from newllm.training.devices import resolve_device, resolve_precision

    for model in settings.models:
        subject = settings.subject(model, 0)
        check_model_spec(subject.pop("model"), **subject)
    for name, value in asdict(settings).items():
        if any(isinstance(number, int) and number < 1 for number in (value if isinstance(value, list) else [value])):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    run = RunSettings(device=settings.device, precision=precision)
    device = resolve_device(run)
    return device.type, resolve_precision(run, device)


def _text_ids(folder: Path, vocab_size: int, progress: Callable[[str], None]) -> str:
    """Token ids of the embedded corpus, in a file for the workers."""
    from newllm.data import prepare

    data: DataSettings = resolve(RunSettings())
    ids = np.asarray(prepare(data, progress).splits["train"].ids) % vocab_size
    np.save(folder / "ids.npy", ids)
    return str(folder / "ids.npy")


def _start(
    stack: contextlib.ExitStack,
    settings: BenchSettings,
    names: Sequence[str],
    models: Sequence[str],
    max_positions: int,
    device: str,
) -> list[Worker]:
    """A worker for each name, with its model built; they end with the stack."""
    workers = []
    for name in names:  # all start before the first builds, so that their imports overlap
        workers.append(Worker(name))
        stack.callback(workers[-1].close)
    for worker, model in zip(workers, models, strict=True):
        worker.call("build", subject=settings.subject(model, max_positions), device=device, threads=settings.threads)
    return workers


def _in_turn(
    workers: list[Worker], rounds: int, progress: Callable[[str], None], label: str, command: str, **arguments: Any
) -> list[list[dict[str, Any]]]:
    """Answers of each worker, round by round; only one works at a time."""
    answers: list[list[dict[str, Any]]] = [[] for _ in workers]
    for n in range(rounds):
        progress(f"{label}: round {n + 1} of {rounds}")
        for worker, own in zip(workers, answers, strict=True):
            own.append(worker.call(command, **arguments))
    return answers


def _rows(workers: list[Worker], seconds: list[list[list[float]]], reference: int = 0) -> list[dict[str, Any]]:
    """seconds[worker][round] → median, and speed relative to the reference."""
    medians = [_median(per_round) for per_round in seconds]
    rows = []
    for worker, median, per_round in zip(workers, medians, seconds, strict=True):
        ratios = [
            statistics.median(theirs) / statistics.median(ours)
            for theirs, ours in zip(seconds[reference], per_round, strict=True)
        ]
        ratio = medians[reference] / median
        rows.append(
            {
                "model": worker.name,
                "seconds": median,
                "speed_ratio": ratio,
                "speed_ratio_range": [min(ratios), max(ratios)],
            }
        )
    return rows


def _median(per_round: list[list[float]]) -> float:
    return statistics.median(itertools.chain.from_iterable(per_round))


def _described(settings: BenchSettings, cases: list[dict[str, Any]]) -> dict[str, Any]:
    from newllm.training.devices import machine_info

    machine = machine_info()
    if settings.threads is not None:
        machine["threads"] = settings.threads
    return {"machine": machine, "settings": asdict(settings), "cases": cases}
