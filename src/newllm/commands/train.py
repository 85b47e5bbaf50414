"""`newllm train`: one run, with its progress in the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from newllm.commands.folders import make_folder
from newllm.settings import RunSettings

if TYPE_CHECKING:
    from newllm.training import TrainProgress


def train(settings: RunSettings, out: str | None) -> None:
    """Trains, or continues, the run in its folder; settings must be resolved."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from newllm.data import prepare
    from newllm.evaluation.perplexity import perplexity
    from newllm.models import check_model_spec, load_plugin
    from newllm.training import resolve_device
    from newllm.training import train as run

    resolve_device(settings)
    if settings.plugin is not None:
        load_plugin(settings.plugin)
    check_model_spec(
        settings.model,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        intermediate_size=settings.intermediate_size,
    )
    folder = Path(out) if out is not None else default_folder(settings)
    make_folder(folder)
    data = prepare(settings, print)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, TimeRemainingColumn()) as display:
        task = display.add_task(settings.model, total=None, figures="")

        def show(progress: TrainProgress) -> None:
            figures = [f"step {progress.step}/{progress.total_steps}", f"{progress.tokens_per_second:,.0f} tokens/s"]
            if progress.loss is not None:
                figures.append(f"loss {progress.loss:.3f}")
            if progress.val_loss is not None:
                figures.append(f"validation {progress.val_loss:.3f}")
            display.update(task, completed=progress.step, total=progress.total_steps, figures=", ".join(figures))

        result = run(settings, data, folder, show)
    print(
        f"trained on {result.tokens:,} tokens in {result.seconds:,.0f} s: validation loss {result.best_val_loss:.4f}, "
        f"perplexity {perplexity(result.best_val_loss):.2f}\nrun folder: {folder}"
    )


def default_folder(settings: RunSettings) -> Path:
    """runs/MODEL-SCALE-SEED, with what a file name cannot hold replaced."""
    return Path("runs") / re.sub(r"[^\w.=-]+", "_", f"{settings.model}-{settings.scale}-{settings.seed}")
