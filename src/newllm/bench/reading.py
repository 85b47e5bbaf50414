"""What one layer's forward costs: compressive layers against the same written as a cumulative sum, and attention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from newllm.bench.rounds import BenchWorker, Progress, Row, best_rows, compare_rounds, described, start_workers
from newllm.bench.settings import ReadingBench
from newllm.devices import resolve_device

RIVAL = "cumulative_sum"


def bench_reading(settings: ReadingBench, progress: Progress) -> dict[str, Any]:
    """Forward passes of one layer over a batch of embeddings, without gradient; each layer in a process of its own.

    In a case all layers read equally many rows, so that no figure is scaled. Where the cumulative sum of the whole
    batch needs more than `rival_gigabytes`, there is one case without it and one with as many rows as fit.

    Returns:
        {"benchmark", "machine", "settings", "references", "cases": [{"num_heads", "batch_size", "seq_length",
        "references", "rows"}]}. A row has model, seconds of a pass, ms_per_row, peak_bytes while reading over what was
        resident before; towards each of the case's references (the cumulative sum and the first layer) speed_ratios,
        see `compare_rounds`, and less_memory, the reference's peak_bytes in units of the row's.
    """
    settings.check()
    device = resolve_device(settings.device)
    ours = settings.layers[0]
    work = {"length": settings.seq_length, "warmup": settings.warmup, "steps": settings.steps}
    cases = []
    for num_heads in settings.num_heads:
        with contextlib.ExitStack() as stack:
            workers = _start(stack, settings, num_heads, device, progress)
            rival_rows = settings.rival_rows(num_heads)
            for batch_size in dict.fromkeys((settings.batch_size, rival_rows)):
                fits = batch_size <= rival_rows
                chosen = [worker for worker in workers if fits or worker.name != RIVAL]
                rows: list[Row] = [{"model": worker.name, "rounds": [], "peak_bytes": 0} for worker in chosen]
                for n in range(settings.rounds):
                    for worker, row in zip(chosen, rows, strict=True):
                        label = f"{num_heads} heads, {batch_size} × {settings.seq_length}"
                        progress(f"{label}: round {n + 1} of {settings.rounds}, {worker.name}")
                        answer = worker.call("read_layer", rows=batch_size, **work)
                        row["rounds"].append(answer["seconds"])
                        row["peak_bytes"] = max(row["peak_bytes"], answer["peak_bytes"])
                references = [RIVAL, ours] if fits else [ours]
                compare_rounds(rows, references)
                for row in rows:
                    row["ms_per_row"] = 1000 * row["seconds"] / batch_size
                    row["less_memory"] = {
                        reference["model"]: reference["peak_bytes"] / max(row["peak_bytes"], 1)
                        for reference in best_rows(rows, references)
                    }
                shape = {"num_heads": num_heads, "batch_size": batch_size, "seq_length": settings.seq_length}
                cases.append(shape | {"references": references, "rows": rows})
    return {"benchmark": "reading"} | described(settings, [RIVAL, ours]) | {"cases": cases}


def _start(
    stack: contextlib.ExitStack, settings: ReadingBench, num_heads: int, device: torch.device, progress: Progress
) -> list[BenchWorker]:
    """A worker for the cumulative sum and one for each layer, built; they end with the stack."""
    progress(f"{num_heads} heads: starting")
    specs = {RIVAL: settings.spec(settings.layers[0], num_heads)}
    specs |= {layer: settings.spec(layer, num_heads) for layer in settings.layers}
    workers = start_workers(stack, specs)
    options = {"device": device.type, "threads": settings.threads, "dtype": settings.dtype}
    for worker in workers:
        worker.call("build_layer", spec=specs[worker.name], cumulative_sum=worker.name == RIVAL, **options)
    return workers
