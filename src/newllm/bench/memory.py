"""Models of this project against Hugging Face's in the same shape: memory while decoding."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from newllm.bench.rounds import Progress, described, start_workers, subject_name
from newllm.bench.settings import MemoryBench
from newllm.devices import resolve_device


def bench_memory(settings: MemoryBench, progress: Progress) -> dict[str, Any]:
    """Memory while one row is decoded up to each context, every model and rival in turn and alone on the machine.

    Every figure comes from a fresh process: what an allocator holds back, and where, depends on what was done before.

    Returns:
        {"benchmark", "machine", "settings", "references", "cases": [{"context", "rows"}]}. A row has model,
        cache_bytes and cache_bytes_allocated (`cache_bytes` of the live cache), both also _per_token, resident_bytes
        with the weights before there is a cache, and peak_bytes while decoding.
    """
    settings.check()
    references = [*settings.rivals, settings.models[0]]
    device = resolve_device(settings.device)
    work = {"dtype": settings.dtype, "chunk": settings.fill_chunk, "steps": settings.steps}
    cases: list[dict[str, Any]] = [{"context": context, "rows": []} for context in sorted(settings.contexts)]
    for case, subject in itertools.product(cases, settings.subjects(max(settings.contexts))):
        context = case["context"]
        with contextlib.ExitStack() as stack:
            (worker,) = start_workers(stack, [subject_name(subject)])
            progress(f"memory after {context:,} tokens: {worker.name}")
            worker.call("build", subject=subject, device=device.type, threads=settings.threads)
            answer = worker.call("decode_memory", context=context, **work)
        row = {"model": worker.name}
        for name, number in (("", answer.pop("used")), ("_allocated", answer.pop("allocated"))):
            row |= {f"cache_bytes{name}": number, f"cache_bytes{name}_per_token": number / context}
        case["rows"].append(row | answer)
    return {"benchmark": "memory"} | described(settings, references) | {"cases": cases}
