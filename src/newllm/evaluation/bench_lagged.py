"""Lagged Cache Training against training step by step: time, memory, and what the models are worth."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.evaluation.bench import Progress, Row, compare_rounds, described, device_and_precision, text_ids
from newllm.evaluation.bench_lagged_settings import LaggedBench, method_settings
from newllm.evaluation.perplexity import perplexity
from newllm.evaluation.processes import Worker

if TYPE_CHECKING:
    from newllm.data import PreparedData


def bench_lagged(settings: LaggedBench, progress: Progress) -> dict[str, Any]:
    """Full training steps by every method, each in a process of its own; with settings.quality, then whole runs.

    A step is one of the second and later epochs, when the states of all windows are kept; in the first, a lagged one
    takes a further forward pass.

    Returns:
        {"benchmark", "precision", "machine", "settings", "references", "cases": [{"batch_size", "seq_length", "rows"}],
        "quality"}. A row has model (the method), seconds of a step, tokens_per_second, seconds_per_epoch, peak_bytes
        without the states that are kept, kept_bytes of those for all windows of an epoch, and speed_ratios towards the
        first method, see `compare_rounds`. quality: see `compare_quality`; or None.
    """
    settings.check()
    device, precision = device_and_precision(settings, settings.precision)
    references = settings.methods[:1]
    work: dict[str, Any] = {"batch_size": settings.batch_size, "seq_length": settings.seq_length}
    work |= {"precision": precision, "warmup": settings.warmup, "steps": settings.steps}
    subject = {"model": settings.model} | settings.shape()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work["ids"] = text_ids(Path(folder), settings.vocab_size, progress)
        progress("lagged: starting")
        workers = [Worker(method) for method in settings.methods]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.call("build", subject=subject, device=device, threads=settings.threads)
        rows: list[Row] = [{"model": worker.name, "rounds": []} for worker in workers]
        for n in range(settings.rounds):
            for worker, row in zip(workers, rows, strict=True):
                progress(f"round {n + 1} of {settings.rounds}, {worker.name}")
                answer = worker.call("train", recurrence=method_settings(worker.name), **work)
                row["rounds"].append(answer["seconds"])
                row["peak_bytes"] = answer["peak_bytes"]
    compare_rounds(rows, references)
    for row in rows:
        row["tokens_per_second"] = settings.batch_size * settings.seq_length / row["seconds"]
        row["seconds_per_epoch"] = row["seconds"] * settings.samples / settings.batch_size
        row["kept_bytes"] = 0 if method_settings(row["model"])["step_by_step"] else settings.kept_bytes()
    case = {"batch_size": settings.batch_size, "seq_length": settings.seq_length, "rows": rows}
    result = {"benchmark": "lagged", "precision": precision} | described(settings, references) | {"cases": [case]}
    return result | {"quality": compare_quality(settings, rows, progress) if settings.quality else None}


def compare_quality(settings: LaggedBench, rows: list[Row], progress: Progress) -> list[dict[str, Any]]:
    """Trains with every method and seed, for equal epochs and for equal time.

    Time is that of training steps, as `rows` have them: validation by true recurrence takes equally long for all.

    Returns:
        records {"method", "seed", "equal": "epochs" or "time", "epochs", "steps", "training_seconds", "val_ppl" by true
        recurrence of the best weights, "curve": the run's metrics.jsonl}.
    """
    from newllm.data import prepare

    first, seconds = rows[0]["seconds"], {row["model"]: row["seconds"] for row in rows}
    data = prepare(settings.run_settings(settings.methods[0], 0, settings.quality_epochs), progress)
    records = []
    for seed in settings.seeds:
        for method in settings.methods:
            epochs = {"epochs": float(settings.quality_epochs)}
            if method != settings.methods[0]:
                epochs["time"] = settings.quality_epochs * first / seconds[method]
            for equal, number in epochs.items():
                progress(f"quality: seed {seed}, {method}, equal {equal}")
                records.append(
                    {"method": method, "seed": seed, "equal": equal}
                    | train_once(settings, method, seed, number, seconds[method], data)
                )
    return records


def train_once(
    settings: LaggedBench, method: str, seed: int, epochs: float, seconds: float, data: PreparedData
) -> dict[str, Any]:
    """One run of `compare_quality`; seconds: of a step."""
    from newllm.training import train

    with tempfile.TemporaryDirectory() as folder:
        result = train(settings.run_settings(method, seed, epochs), data, Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return {
        "epochs": epochs,
        "steps": result.steps,
        "training_seconds": result.steps * seconds,
        "val_ppl": perplexity(result.best_val_loss),
        "curve": [json.loads(line) for line in lines],
    }
