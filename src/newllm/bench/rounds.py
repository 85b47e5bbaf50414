"""What all benchmarks share: workers that take turns, and what is told of their times.

Each model is a process of its own (`worker.py`); they work in turn, round by round, and begin every turn with steps
that are not counted: the first ones after another process has worked find cold caches. A ratio of a round is a ratio
under the same load; reported are the median of all steps, and of the ratios of the rounds the median, the lowest and
the highest.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from newllm.bench.settings import BenchSettings, LayerBench
from newllm.devices import machine_info
from newllm.errors import UserError
from newllm.evaluation.processes import Worker
from newllm.evaluation.timing import mean_of_medians
from newllm.resolution import resolve
from newllm.settings import DataSettings, RunSettings

Progress = Callable[[str], None]
Row = dict[str, Any]


class BenchWorker(Worker):
    """A measuring process that knows the rivals and single layers too."""

    module = "newllm.bench.worker"


def start_workers(
    stack: contextlib.ExitStack, names: Iterable[str], without_kernels: Container[str] = ()
) -> list[BenchWorker]:
    """A worker of each name; they end with the stack. All start before the first builds: their imports overlap.

    without_kernels: those that take torch's operators in place of our own kernels.
    """
    workers = []
    for name in names:
        workers.append(BenchWorker(name, {"NEWLLM_NATIVE": "0"} if name in without_kernels else None))
        stack.callback(workers[-1].close)
    return workers


def start_models(
    stack: contextlib.ExitStack, settings: BenchSettings, max_positions: int, device: torch.device
) -> list[BenchWorker]:
    """A worker for each rival and model, with its model built."""
    subjects = {subject_name(subject): subject for subject in settings.subjects(max_positions)}
    without_kernels = [name for name, subject in subjects.items() if not subject.pop("kernels", True)]
    workers = start_workers(stack, subjects, without_kernels)
    for worker in workers:
        worker.call("build", subject=subjects[worker.name], device=device.type, threads=settings.threads)
    return workers


def subject_name(subject: dict[str, Any]) -> str:
    """What the row of a rival or model is called, see `BenchSettings.subjects`."""
    return subject.get("rival") or subject["model"] + ("" if subject.get("kernels", True) else ", torch's operators")


def text_ids(folder: Path, vocab_size: int, progress: Progress, longest: int = 0) -> str:
    """Token ids of the embedded corpus, in a file for the workers. Raises UserError where `longest` does not fit in."""
    from newllm.data import prepare

    data: DataSettings = resolve(RunSettings())
    ids = np.asarray(prepare(data, progress).splits["train"].ids, dtype=np.int64) % vocab_size
    if longest >= len(ids):
        raise UserError(f"a window of {longest:,} tokens is too long: choose fewer than the text's {len(ids):,}")
    np.save(folder / "ids.npy", ids)
    return str(folder / "ids.npy")


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


def best_rows(rows: list[Row], names: list[str]) -> list[Row]:
    """The best row of each of these models."""
    return [next(row for row in rows if row["model"] == name and row["best"]) for name in names]


def described(settings: LayerBench, references: list[str]) -> dict[str, Any]:
    """What every result says of itself."""
    machine = machine_info()
    if settings.threads is not None:
        machine["threads"] = settings.threads
    return {"machine": machine, "settings": asdict(settings), "references": references}
