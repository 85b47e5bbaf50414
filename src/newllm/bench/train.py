"""Models of this project against Hugging Face's in the same shape: training."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from newllm.bench.rounds import Progress, Row, best_rows, compare_rounds, described, start_models, text_ids
from newllm.bench.settings import TrainBench
from newllm.devices import resolve_device, resolve_precision


def bench_train(settings: TrainBench, progress: Progress) -> dict[str, Any]:
    """Full training steps of every model and rival.

    Returns:
        {"benchmark", "precision", "machine", "settings", "references", "cases": [{"batch_size", "seq_length",
        "rows"}]}. A row has model, seconds of a step, tokens_per_second, peak_bytes, and towards each reference (the
        rivals and the first model) speed_ratios and memory_ratios, see `compare_rounds`.
    """
    settings.check()
    references = [*settings.rivals, settings.models[0]]
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        ids = text_ids(Path(folder), settings.vocab_size, progress, max(settings.seq_lengths))
        for length in settings.seq_lengths:
            label = f"train {settings.batch_size} × {length}"
            work: dict[str, Any] = {"batch_size": settings.batch_size, "seq_length": length, "precision": precision}
            work |= {"ids": ids, "warmup": settings.warmup, "steps": settings.steps}
            with contextlib.ExitStack() as stack:
                progress(f"{label}: starting")
                workers = start_models(stack, settings, length, device)
                rows: list[Row] = [{"model": worker.name, "rounds": []} for worker in workers]
                for n in range(settings.rounds):
                    for worker, row in zip(workers, rows, strict=True):
                        progress(f"{label}: round {n + 1} of {settings.rounds}, {worker.name}")
                        answer = worker.call("train", **work)
                        row["rounds"].append(answer["seconds"])
                        row["peak_bytes"] = answer["peak_bytes"]
            compare_rounds(rows, references)
            for row in rows:
                row["tokens_per_second"] = settings.batch_size * length / row["seconds"]
                row["memory_ratios"] = {
                    reference["model"]: row["peak_bytes"] / reference["peak_bytes"]
                    for reference in best_rows(rows, references)
                }
            cases.append({"batch_size": settings.batch_size, "seq_length": length, "rows": rows})
    return {"benchmark": "train", "precision": precision} | described(settings, references) | {"cases": cases}
