"""`newllm train`: one run, with its progress in the terminal."""

from __future__ import annotations

from pathlib import Path

from newllm.paths import user_path
from newllm.settings import RunSettings


def train(settings: RunSettings, out: str | None) -> None:
    """Trains, or continues, the run in its folder; settings must be resolved."""
    from rich.console import Console

    from newllm.data import prepare
    from newllm.devices import resolve_device
    from newllm.evaluation.perplexity import perplexity
    from newllm.experiments.progress import Display, duration
    from newllm.models import load_plugin, meta_model
    from newllm.training import check_loggers, check_suitability
    from newllm.training import train as run
    from newllm.training.checkpoints import make_folder, refuse_other_files
    from newllm.training.ranks import first_alone, is_first, joined, locked_by_first

    device = resolve_device(settings.device)
    check_loggers(settings)
    if settings.plugin is not None:
        load_plugin(settings.plugin)
    meta_model(settings.model, **settings.shape())
    check_suitability(settings, [settings.model])
    shown = user_path(out) if out else default_folder(settings)
    folder = shown.resolve()  # a folder that is moved aside may be the one we are in
    with joined(device):
        with first_alone() as first:
            if first:
                make_folder(folder)
                refuse_other_files(folder)
        with locked_by_first(folder), Display(Console(quiet=not is_first()), total_runs=1) as display:
            with first_alone():
                data = prepare(settings, display.say)
            result = run(settings, data, folder, display.start(0, settings))
    if not is_first():
        return
    print(
        f"trained on {result.tokens:,} tokens in {duration(result.seconds)}: "
        f"validation loss {result.best_val_loss:.4f}, perplexity {perplexity(result.best_val_loss):.2f}\n"
        f"run folder: {shown}"
    )


def default_folder(settings: RunSettings) -> Path:
    """runs/MODEL-SCALE-SEED, with what a file name cannot hold replaced."""
    from newllm.training.checkpoints import file_name

    return Path("runs") / file_name(f"{settings.model}-{settings.scale}-{settings.seed}")
