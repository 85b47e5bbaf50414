"""Models of this project against Hugging Face's in the same shape: training, decoding, memory while decoding.

Each model is a process of its own (`worker.py`); they work in turn, round by round, and begin every turn with steps
that are not counted: the first ones after another process has worked find cold caches. A ratio of a round is a ratio
under the same load; reported are the median of all steps, and of the ratios of the rounds the median, the lowest and
the highest.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from newllm.evaluation.bench_settings import BenchSettings, DecodeBench, LayerBench, MemoryBench, TrainBench
from newllm.evaluation.processes import Worker
from newllm.settings import DataSettings, Precision, RunSettings, resolve

Progress = Callable[[str], None]
Row = dict[str, Any]
DTYPES = ("bfloat16", "float32")


def bench_train(settings: TrainBench, progress: Progress) -> dict[str, Any]:
    """Full training steps of every model and rival.

    Returns:
        {"benchmark", "precision", "machine", "settings", "references", "cases": [{"batch_size", "seq_length",
        "rows"}]}. A row has model, seconds of a step, tokens_per_second, peak_bytes, and towards each reference (the
        rivals and the first model) speed_ratios and memory_ratios, see `compare_rounds`.
    """
    settings.check()
    references = [*settings.rivals, settings.models[0]]
    device, precision = device_and_precision(settings, settings.precision)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        ids = text_ids(Path(folder), settings.vocab_size, progress)
        for length in settings.seq_lengths:
            label = f"train {settings.batch_size} × {length}"
            work: dict[str, Any] = {"batch_size": settings.batch_size, "seq_length": length, "precision": precision}
            work |= {"ids": ids, "warmup": settings.warmup, "steps": settings.steps}
            with contextlib.ExitStack() as stack:
                progress(f"{label}: starting")
                workers = _start(stack, settings, length, device)
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
    device, _ = device_and_precision(settings, "auto")
    cases: list[dict[str, Any]] = []
    ceilings: list[float] = []
    with contextlib.ExitStack() as stack:
        progress("decode: starting")
        workers = _start(stack, settings, max(settings.contexts) + settings.warmup + settings.steps, device)
        reader = Worker("memory bandwidth")
        stack.callback(reader.close)
        read = {"device": device, "threads": settings.threads, "megabytes": settings.ceiling_megabytes}
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
    device, _ = device_and_precision(settings, "auto")
    work = {"dtype": settings.dtype, "chunk": settings.fill_chunk, "steps": settings.steps}
    cases: list[dict[str, Any]] = [{"context": context, "rows": []} for context in sorted(settings.contexts)]
    for case, subject in itertools.product(cases, settings.subjects(max(settings.contexts))):
        context = case["context"]
        with contextlib.closing(Worker(_name(subject))) as worker:
            progress(f"memory after {context:,} tokens: {worker.name}")
            worker.call("build", subject=subject, device=device, threads=settings.threads)
            answer = worker.call("decode_memory", context=context, **work)
        row = {"model": worker.name}
        for name, number in (("", answer.pop("used")), ("_allocated", answer.pop("allocated"))):
            row |= {f"cache_bytes{name}": number, f"cache_bytes{name}_per_token": number / context}
        case["rows"].append(row | answer)
    return {"benchmark": "memory"} | described(settings, references) | {"cases": cases}


def device_and_precision(settings: LayerBench, precision: Precision) -> tuple[str, str]:
    from newllm.training.devices import resolve_device, resolve_precision

    run = RunSettings(device=settings.device, precision=precision)
    device = resolve_device(run)
    return device.type, resolve_precision(run, device)


def text_ids(folder: Path, vocab_size: int, progress: Progress) -> str:
    """Token ids of the embedded corpus, in a file for the workers."""
    from newllm.data import prepare

    data: DataSettings = resolve(RunSettings())
    ids = np.asarray(prepare(data, progress).splits["train"].ids) % vocab_size
    np.save(folder / "ids.npy", ids)
    return str(folder / "ids.npy")


def _name(subject: dict[str, Any]) -> str:
    return subject.get("rival") or subject["model"]


def _start(stack: contextlib.ExitStack, settings: BenchSettings, max_positions: int, device: str) -> list[Worker]:
    """A worker for each rival and model, with its model built; they end with the stack."""
    subjects = settings.subjects(max_positions)
    workers = []
    for subject in subjects:  # all start before the first builds, so that their imports overlap
        workers.append(Worker(_name(subject)))
        stack.callback(workers[-1].close)
    for worker, subject in zip(workers, subjects, strict=True):
        worker.call("build", subject=subject, device=device, threads=settings.threads)
    return workers


def compare_rounds(rows: list[Row], references: list[str]) -> None:
    """Turns `rounds`, the seconds of every step of every round, into what is reported.

    seconds is the median of all steps, round_seconds that of each round. A row may take other steps now and then, a
    share `rare_share` of all, so few that no median sees them: their seconds are apart in `rare_rounds`, and both
    figures are means of the two medians, by that share. best marks the fastest row of each model;
    speed_ratios has for each reference, a model in its best row, the ratio of its median to ours within one round:
    {"ratio": median over the rounds, "range": [lowest, highest]}.
    """
    for row in rows:
        rounds = row.pop("rounds")
        rare, share = row.pop("rare_rounds", rounds), row.pop("rare_share", 0.0)
        row["seconds"] = mean_of_medians(itertools.chain(*rounds), itertools.chain(*rare), share)
        row["round_seconds"] = [mean_of_medians(*steps, share) for steps in zip(rounds, rare, strict=True)]
    for row in rows:
        row["best"] = row["seconds"] == min(other["seconds"] for other in rows if other["model"] == row["model"])
    for row in rows:
        row["speed_ratios"] = {}
        for reference in best_rows(rows, references):
            rounds = zip(reference["round_seconds"], row["round_seconds"], strict=True)
            ratios = [theirs / ours for theirs, ours in rounds]
            row["speed_ratios"][reference["model"]] = {
                "ratio": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
            }


def mean_of_medians(usual: Iterable[float], rare: Iterable[float], share: float) -> float:
    """What a step takes on average, of which `share` are rare ones."""
    return (1 - share) * statistics.median(usual) + share * statistics.median(rare)


def best_rows(rows: list[Row], names: list[str]) -> list[Row]:
    """The best row of each of these models."""
    return [next(row for row in rows if row["model"] == name and row["best"]) for name in names]


def described(settings: LayerBench, references: list[str]) -> dict[str, Any]:
    """What every result says of itself."""
    from newllm.training.devices import machine_info

    machine = machine_info()
    if settings.threads is not None:
        machine["threads"] = settings.threads
    return {"machine": machine, "settings": asdict(settings), "references": references}
