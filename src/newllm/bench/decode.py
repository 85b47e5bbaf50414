"""Models of this project against Hugging Face's in the same shape: decoding."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from newllm.bench.rounds import Progress, Row, compare_rounds, described, start_models, start_workers
from newllm.bench.settings import DecodeBench
from newllm.devices import resolve_device

DTYPES = ("bfloat16", "float32")


def bench_decode(settings: DecodeBench, progress: Progress) -> dict[str, Any]:
    """Milliseconds of a step that decodes one token in each row, every model and rival in bf16 and in float32.

    A turn fills the cache anew and drops it, so that only one is in memory at a time. The memory bandwidth is measured
    in every round too, by reading a large buffer; the best of the whole run is the ceiling.

    Returns:
        {"benchmark", "machine", "settings", "references", "ceiling_bytes_per_second", "cases": [{"batch_size",
        "context", "rows"}]}. A row is a model in a dtype, `best` if it is the faster of the model's two, with
        ms_per_step, tokens_per_second, weight_bytes and cache_bytes, which a step must read, ceiling_share, the
        bandwidth at which it reads them in units of the ceiling, and speed_ratios towards the references in their
        best dtype.
    """
    settings.check()
    references = [*settings.rivals, settings.models[0]]
    device = resolve_device(settings.device)
    cases: list[dict[str, Any]] = []
    ceilings: list[float] = []
    with contextlib.ExitStack() as stack:
        progress("decode: starting")
        longest = max(settings.contexts) + settings.warmup + settings.steps
        workers = start_models(stack, settings, longest, device)
        (reader,) = start_workers(stack, ["memory bandwidth"])
        read = {"device": device.type, "threads": settings.threads, "megabytes": settings.ceiling_megabytes}
        for batch_size, context in itertools.product(settings.batch_sizes, settings.contexts):
            work: dict[str, Any] = {"rows": batch_size, "context": context, "chunk": settings.fill_chunk}
            work |= {"warmup": settings.warmup, "steps": settings.steps, "seconds": settings.seconds}
            turns = list(itertools.product(workers, DTYPES))
            rows: list[Row] = [{"model": worker.name, "dtype": dtype, "rounds": []} for worker, dtype in turns]
            for n in range(settings.rounds):
                label = f"decode {batch_size} × {context:,}: round {n + 1} of {settings.rounds}"
                progress(f"{label}, memory bandwidth")
                ceilings.append(reader.call("bandwidth", seconds=settings.seconds, **read)["bytes_per_second"])
                for (worker, dtype), row in zip(turns, rows, strict=True):
                    progress(f"{label}, {worker.name} {dtype}")
                    answer = worker.call("decode_filled", dtype=dtype, **work)
                    row["rounds"].append(answer.pop("seconds"))
                    row |= answer
            compare_rounds(rows, references)
            cases.append({"batch_size": batch_size, "context": context, "rows": rows})
    for case in cases:
        for row in case["rows"]:
            bandwidth = (row["weight_bytes"] + row["cache_bytes"]) / row["seconds"]
            row["ms_per_step"] = 1000 * row["seconds"]
            row["tokens_per_second"] = case["batch_size"] / row["seconds"]
            row["ceiling_share"] = bandwidth / max(ceilings)
    ceiling = {"ceiling_bytes_per_second": max(ceilings), "ceiling_rounds": ceilings}
    return {"benchmark": "decode"} | described(settings, references) | ceiling | {"cases": cases}
