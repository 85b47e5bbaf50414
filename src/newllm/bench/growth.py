"""What a model remembers with, and how long a token takes, while it reads a long text."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from newllm.bench.rounds import Progress, Row, compare_rounds, described, start_workers, text_ids
from newllm.bench.settings import GrowthBench
from newllm.devices import resolve_device


def bench_growth(settings: GrowthBench, progress: Progress) -> dict[str, Any]:
    """State bytes, milliseconds of a decoded token and peak memory at marks along a long text, one row.

    Every model is a process of its own, which reads on from mark to mark; at a mark they decode in turn, round by
    round, the last tokens before it. States of fixed size read every token, others are filled, see `stream.Stream`.

    Returns:
        {"benchmark", "machine", "settings", "references", "cases": [{"tokens", "rows"}]}. A row has model;
        ms_per_token, the median of all decoded tokens, and ms_per_token_mean; state_bytes and state_bytes_allocated
        (`cache_bytes` of the live state after `tokens` tokens); resident_bytes with the weights before there is a
        state, peak_bytes while decoding; speed_ratios towards the first model, see `compare_rounds`.
    """
    settings.check()
    device = resolve_device(settings.device)
    references = settings.models[:1]
    turn = settings.warmup + settings.steps
    cases = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ids = text_ids(Path(folder), settings.vocab_size, progress)
        workers = start_workers(stack, settings.models)
        resident: dict[str, int] = {}
        for worker in workers:
            progress(f"growth: starting {worker.name}")
            subject = {"model": worker.name} | settings.shape()
            worker.call("build", subject=subject, device=device.type, threads=settings.threads)
            start = worker.call("start_stream", dtype=settings.dtype, chunk=settings.chunk, ids=ids)
            resident[worker.name] = start["resident_bytes"]
        for mark in sorted(settings.marks):
            rows: list[Row] = [{"model": worker.name, "rounds": [], "peak_bytes": 0} for worker in workers]
            for n in range(settings.rounds):
                for worker, row in zip(workers, rows, strict=True):
                    progress(f"{mark:,} tokens: round {n + 1} of {settings.rounds}, {worker.name}")
                    tokens = mark - (settings.rounds - 1 - n) * turn
                    answer = worker.call("grow", tokens=tokens, warmup=settings.warmup, steps=settings.steps)
                    row["rounds"].append(answer["seconds"])
                    row |= {"state_bytes": answer["used"], "state_bytes_allocated": answer["allocated"]}
                    row["peak_bytes"] = max(row["peak_bytes"], answer["peak_bytes"])
            for row in rows:
                row["ms_per_token_mean"] = 1000 * statistics.fmean(itertools.chain.from_iterable(row["rounds"]))
                row["resident_bytes"] = resident[row["model"]]
            compare_rounds(rows, references)
            for row in rows:
                row["ms_per_token"] = 1000 * row["seconds"]
            cases.append({"tokens": mark, "rows": rows})
    return {"benchmark": "growth"} | described(settings, references) | {"cases": cases}
