"""Lagged Cache Training against training step by step: time, memory, and what the models are worth."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.bench.lagged_settings import LaggedBench, method_settings
from newllm.bench.rounds import Progress, Row, compare_rounds, described, start_workers, text_ids
from newllm.devices import resolve_device, resolve_precision
from newllm.evaluation.perplexity import perplexity, token_weighted_loss
from newllm.evaluation.processes import Worker
from newllm.settings import RunSettings

if TYPE_CHECKING:
    from newllm.data import PreparedData


def bench_lagged(settings: LaggedBench, progress: Progress) -> dict[str, Any]:
    """Full training steps by every method, each in a process of its own; with settings.quality, then whole runs.

    A step is one of the second and later epochs, when the states of all windows are kept; in the first, a lagged one
    takes a discrete pass too, a forward. Deeper steps are timed by themselves, and count by their share.

    Returns:
        {"benchmark", "precision", "machine", "settings", "references", "cases": [{"batch_size", "seq_length", "rows"}],
        "quality"}. A row has model (the method), seconds of a step, discrete_seconds of a discrete pass (0 where there
        is none), tokens_per_second, seconds_per_epoch, peak_bytes without the states that are kept, kept_bytes of those
        for all windows of an epoch, and speed_ratios towards the first method, see `compare_rounds`. quality: see
        `compare_quality`; or None.
    """
    settings.check()
    if settings.quality:
        quality_data(settings, progress)  # what is wrong with it is told before anything is timed
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    references = settings.methods[:1]
    work: dict[str, Any] = {"batch_size": settings.batch_size, "seq_length": settings.seq_length}
    work |= {"precision": precision, "warmup": settings.warmup, "steps": settings.steps}
    subject = {"model": settings.model} | settings.shape()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work["ids"] = text_ids(Path(folder), settings.vocab_size, progress, settings.seq_length)
        progress("lagged: starting")
        workers = start_workers(stack, settings.methods)
        for worker in workers:
            worker.call("build", subject=subject, device=device.type, threads=settings.threads)
        rows: list[Row] = [{"model": worker.name, "rounds": []} for worker in workers]
        discrete: list[list[float]] = [[] for _ in workers]
        for n in range(settings.rounds):
            for worker, row, passes in zip(workers, rows, discrete, strict=True):
                progress(f"round {n + 1} of {settings.rounds}, {worker.name}")
                passes += take_turn(worker, row, work)
    compare_rounds(rows, references)
    for row, passes in zip(rows, discrete, strict=True):
        row["discrete_seconds"] = statistics.median(passes) if passes else 0.0
        row["tokens_per_second"] = settings.batch_size * settings.seq_length / row["seconds"]
        row["seconds_per_epoch"] = row["seconds"] * settings.samples / settings.batch_size
        row["kept_bytes"] = 0 if method_settings(row["model"])["step_by_step"] else settings.kept_bytes()
    case = {"batch_size": settings.batch_size, "seq_length": settings.seq_length, "rows": rows}
    result = {"benchmark": "lagged", "precision": precision} | described(settings, references) | {"cases": [case]}
    return result | {"quality": compare_quality(settings, rows, progress) if settings.quality else None}


def take_turn(worker: Worker, row: Row, work: dict[str, Any]) -> list[float]:
    """A method's turn of a round: its steps, noted in the row for `compare_rounds`; the seconds of discrete passes."""
    recurrence = method_settings(worker.name)
    kinds = {"rounds": False}
    if share := recurrence.get("lagged_deep_share"):
        row |= {"rare_share": share, "rare_rounds": row.get("rare_rounds", [])}
        kinds["rare_rounds"] = True
    for rounds, deep in kinds.items():
        answer = worker.call("train", recurrence=recurrence, deep=deep, **work)
        row[rounds].append(answer["seconds"])
        row["peak_bytes"] = answer["peak_bytes"]
    return [] if recurrence["step_by_step"] else worker.call("discrete", **work)["seconds"]


def compare_quality(settings: LaggedBench, rows: list[Row], progress: Progress) -> list[dict[str, Any]]:
    """Trains with every method and seed, for equal epochs and, but those of settings.quality_untimed, for equal time.

    Time is that of training steps, as `rows` have them, with the discrete passes of the first epoch. Validation by true
    recurrence is left out: it takes equally long for all, and each run validates equally often.

    Returns:
        records {"method", "seed", "equal": "epochs" or "time", "epochs", "steps", "training_seconds", "val_ppl" and
        "test_ppl" by true recurrence of the weights that validation has chosen, "curve": the run's metrics.jsonl}. Of a
        run that has ended because a loss was not finite, both perplexities are infinite.
    """
    from newllm.data.windows import WindowDataset

    data = quality_data(settings, progress)
    windows = len(WindowDataset(data.splits["train"], settings.seq_length, settings.quality_samples, seed=0))
    epoch = windows / settings.batch_size  # in steps
    equal_epochs = math.ceil(settings.quality_epochs * epoch)
    time = training_seconds(rows[0], equal_epochs, epoch)
    records = []
    for seed in settings.seeds:
        for method, row in zip(settings.methods, rows, strict=True):
            budgets = {"epochs": equal_epochs}
            if row is not rows[0] and method not in settings.quality_untimed:
                budgets["time"] = steps_within(row, time, epoch)
            for equal, steps in budgets.items():
                run = f"quality: seed {seed}, {method}, equal {equal}, {steps:,} steps"
                progress(run)
                records.append(
                    {"method": method, "seed": seed, "equal": equal, "epochs": steps / epoch, "steps": steps}
                    | {"training_seconds": training_seconds(row, steps, epoch)}
                    | train_once(settings.run_settings(method, seed, steps), data)
                )
                progress(f"{run}: test perplexity {records[-1]['test_ppl']:.2f}")
    return records


def quality_data(settings: LaggedBench, progress: Progress) -> PreparedData:
    """The text of the runs of `compare_quality`. Raises UserError where there is none, or too little."""
    from newllm.data import prepare

    return prepare(settings.run_settings(settings.methods[0], 0, steps=1), progress)


def training_seconds(row: Row, steps: float, epoch: float) -> float:
    """What so many steps take, where a pass over all windows has `epoch` of them."""
    return steps * row["seconds"] + min(steps, epoch) * row["discrete_seconds"]


def steps_within(row: Row, seconds: float, epoch: float) -> int:
    """The number of steps, at least one, whose `training_seconds` are the nearest to these."""
    first = training_seconds(row, epoch, epoch)
    if seconds < first:
        return max(1, round(seconds / (row["seconds"] + row["discrete_seconds"])))
    return round(epoch + (seconds - first) / row["seconds"])


def train_once(run: RunSettings, data: PreparedData) -> dict[str, Any]:
    """One run of `compare_quality`."""
    from newllm.models import load_model
    from newllm.training import train
    from newllm.training.callbacks import DivergedError

    with tempfile.TemporaryDirectory() as temporary:
        folder, validation, test = Path(temporary) / "run", math.inf, math.inf
        with contextlib.suppress(DivergedError):  # a result like any other, and no reason to lose those of other runs
            validation = train(run, data, folder).best_val_loss
            model = load_model(folder).to(resolve_device(run.device))  # type: ignore[arg-type]
            test = token_weighted_loss(model, data.splits["test"], run)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    return {"val_ppl": perplexity(validation), "test_ppl": perplexity(test), "curve": curve}
