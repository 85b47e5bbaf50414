"""Training of one model in a run folder, from the settings to the saved weights.

A model with a first phase (`models/reconstruction.py`) is trained twice, in the same way: the first time on that
phase's loss, in a folder inside the run folder, and then as a language model with the first phase's parameters frozen.
A diverse projection has a first phase of another kind (`training/projection.py`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from newllm.data.tasks import TASKS, WithTasks, stack_windows, task_shares, training_tasks
from newllm.data.windows import StreamDataset, TaskDataset, WindowDataset
from newllm.devices import prepare_process, resolve_device
from newllm.errors import UserError
from newllm.models import TransformerLM, create_model
from newllm.models.projection import DProjLM
from newllm.models.reconstruction import Reconstruction
from newllm.settings import CommonSettings, RunSettings
from newllm.training.callbacks import MetricsCallback, ProgressCallback, Schedule, TrainProgress
from newllm.training.checkpoints import (
    checkpoints,
    claim_run_folder,
    complete_folder,
    explaining_full_disk,
    remove_except,
    remove_incomplete,
    training_result,
    write_result,
)
from newllm.training.lagged_store import remove_states
from newllm.training.projection import PROJECTION, ProjectionResult, train_projection
from newllm.training.ranks import first_alone, is_first, joined, locked_by_first, of_first, world_size
from newllm.training.start import Start, start_from
from newllm.training.suitability import check_suitability
from newllm.training.trainer import LMTrainer, training_arguments

if TYPE_CHECKING:
    from newllm.data import PreparedData

RECONSTRUCTION = "reconstruction"  # the first phase: its folder, its entry in result.json, its name in the display


@dataclass(frozen=True)
class TrainResult:
    """What a finished training run, or its first phase, says about itself."""

    tokens: int
    """Training tokens seen, up to the last step."""
    steps: int
    seconds: float
    """Wall time of all steps, evaluations and checkpoints, over every continuation of the run."""
    best_val_loss: float
    """Validation loss of the weights that were kept: in nats per token; of a first phase, what it minimises."""
    best_step: int
    tokens_per_second: float
    """tokens / seconds: noisy; `newllm.evaluation.efficiency` measures the speed alone."""
    stopped_early: bool


def total_steps(settings: RunSettings, num_windows: int, samples_per_step: int) -> int:
    """The budget in optimizer steps: never more than --max-tokens, else all of samples × epochs."""
    if settings.max_tokens is not None:
        return max(1, settings.max_tokens // (samples_per_step * settings.seq_length))  # type: ignore[operator]
    if settings.samples is not None:  # a stream goes on where an epoch of so many of its windows has ended
        num_windows = min(num_windows, settings.samples)
    return max(1, math.ceil(num_windows * (settings.epochs or 1) / samples_per_step))


def check_loggers(settings: CommonSettings) -> None:
    """Raises UserError for a logger of --report-to that is not installed."""
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name}: this package is not installed (pip install {name})")


def train(
    settings: RunSettings,
    data: PreparedData,
    folder: Path,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Trains settings.model on the training split, or continues where an interrupted call stopped.

    folder receives config.yaml, metrics.jsonl, model/ (best weights by validation loss, tokenizer) and, in
    result.json under "training", the returned result; a second call returns that. settings must be resolved.
    Of a first phase: reconstruction/metrics.jsonl, and under "reconstruction" what "training" says of the second; or
    projection/metrics.jsonl, and under "projection" a ProjectionResult. With start_from: under "start" a Start.
    Raises UserError when the loss is not finite or the disk is full, KeyboardInterrupt (state saved) on Ctrl-C.

    With settings.streaming the training text is read as streams (`data.windows.StreamDataset`). Validation is by
    windows in either case, each read from an empty state, so that the losses of all runs are of one kind.
    """
    check_suitability(settings, [settings.model])
    tasks = training_tasks(data, settings, settings.seed)
    folder = folder.resolve()  # a folder that is moved aside may be the one we are in
    with joined(resolve_device(settings.device)), locked_by_first(folder), explaining_full_disk(folder):
        result: dict[str, Any] = {}
        if is_first():
            result = claim_run_folder(folder, settings, data.fingerprint, processes=world_size())
        result = of_first(result)
        if "training" not in result:
            results = _train(settings, data, tasks, folder, result, on_progress)
            result |= {phase: asdict(phase_result) for phase, phase_result in results.items()}
            if is_first():
                write_result(folder, result)
        with first_alone() as first:
            if first:
                for place in filter(Path.is_dir, (folder, folder / RECONSTRUCTION, folder / PROJECTION)):
                    remove_except(place, set())
                remove_states(folder)
    return training_result(TrainResult, folder, result)


def _train(
    settings: RunSettings,
    data: PreparedData,
    tasks: list[TaskDataset],
    folder: Path,
    before: dict[str, Any],
    on_progress: Callable[[TrainProgress], None] | None,
) -> dict[str, TrainResult | ProjectionResult | Start]:
    """All phases, and model/; the result of each phase by its name in result.json, which says `before` so far."""
    transformers.utils.logging.disable_progress_bar()
    prepare_process(settings.threads)
    assert settings.seq_length is not None
    windows = WindowDataset(data.splits["train"], settings.seq_length, settings.samples, settings.seed)
    transformers.set_seed(settings.seed)
    model = new_model(settings, data)
    use_cache = model.config.use_cache
    results: dict[str, TrainResult | ProjectionResult | Start] = {}
    if settings.start_from is not None:
        # A checkpoint of a later phase has all weights: what the run began with is then only to be told.
        later = any(checkpoints(place) for place in (folder, folder / RECONSTRUCTION) if place.is_dir())
        if later and "start" in before:
            start = training_result(Start, folder, before, "start")
        else:
            start = start_from(model, settings, data)
            if is_first():
                write_result(folder, before | {"start": asdict(start)})
        results["start"] = start
    if isinstance(model, DProjLM):
        projected = train_projection(model, settings, data, folder / PROJECTION, on_progress)
        results |= {} if projected is None else {PROJECTION: projected}
    first = model.reconstruction()
    if first is not None:
        first.freeze_the_rest()
        own = reconstruction_settings(settings, len(windows))
        results[RECONSTRUCTION] = _train_phase(first, own, windows, data, folder, RECONSTRUCTION, on_progress)
    texts: WindowDataset | WithTasks | StreamDataset = WithTasks(windows, tasks) if tasks else windows
    if settings.streaming:
        assert settings.batch_size is not None
        texts = StreamDataset(data.splits["train"], settings.seq_length, settings.batch_size, settings.seed)
    model.freeze_first_phase()
    results["training"] = _train_phase(model, settings, texts, data, folder, "", on_progress)
    model.config.use_cache = use_cache  # the Trainer turns it off
    if is_first():
        with complete_folder(folder / "model") as staging:
            model.save_pretrained(staging)
            data.tokenizer.save_pretrained(staging)
    return results


def reconstruction_settings(settings: RunSettings, num_windows: int) -> RunSettings:
    """Those of the first phase: its own learning rate and passes over the windows; never more than --max-tokens.

    It carries no state and answers no questions: no streams, no windows of tasks. The extra loggers get the second
    phase alone: they could not tell the two losses apart.
    """
    assert settings.seq_length is not None
    tokens = math.ceil(settings.reconstruction_epochs * num_windows) * settings.seq_length
    return replace(
        settings,
        lr=settings.reconstruction_lr,
        epochs=settings.reconstruction_epochs,
        evaluations=1,
        max_tokens=tokens if settings.max_tokens is None else min(tokens, settings.max_tokens),
        report_to=[],
        streaming=False,
        **dict.fromkeys(TASKS, 0.0),  # type: ignore[arg-type]
    )


def _train_phase(
    model: TransformerLM | Reconstruction,
    settings: RunSettings,
    windows: WindowDataset | WithTasks | StreamDataset,
    data: PreparedData,
    run_folder: Path,
    phase: str,
    on_progress: Callable[[TrainProgress], None] | None,
) -> TrainResult:
    """Trains to the end, or continues; the model then has the phase's best weights. Does nothing more if called again.

    phase: name of the sub-folder with the phase's metrics.jsonl and checkpoints; empty for the run folder itself.
    """
    folder = run_folder / phase
    with first_alone() as first:
        if first:
            folder.mkdir(exist_ok=True)
            remove_incomplete(folder)
    arguments = training_arguments(settings, folder, steps=1)
    samples_per_step = arguments.train_batch_size * settings.gradient_accumulation * arguments.world_size
    # Every parameter of our layers has a gradient in every step; of other models some may lie idle.
    arguments.ddp_find_unused_parameters = type(model) not in (TransformerLM, Reconstruction) or bool(settings.plugin)
    arguments.max_steps = total_steps(settings, len(windows), samples_per_step)
    schedule = Schedule.of(arguments.max_steps, settings)
    tokens_per_step = samples_per_step * settings.seq_length  # type: ignore[operator]
    if isinstance(windows, WithTasks):
        windows.expect(arguments.max_steps, list(task_shares(settings).values()), samples_per_step)
    trainer = LMTrainer(
        settings=settings,
        schedule=schedule,
        validation=data.splits["validation"],
        tokens_per_step=tokens_per_step,
        phase=phase,
        model=model,
        args=arguments,
        train_dataset=windows,
        data_collator=stack_windows,
        callbacks=[MetricsCallback(folder / "metrics.jsonl")],
    )
    if on_progress is not None and is_first():
        trainer.add_callback(ProgressCallback(settings, schedule, tokens_per_step, phase, on_progress))
    state = trainer.finish()
    seconds = state.log_history[-1]["seconds"]
    tokens = state.global_step * tokens_per_step
    return TrainResult(
        tokens=tokens,
        steps=state.global_step,
        seconds=seconds,
        best_val_loss=state.best_metric,  # type: ignore[arg-type]
        best_step=state.best_global_step,  # type: ignore[arg-type]
        tokens_per_second=tokens / seconds,
        stopped_early=state.global_step < schedule.total_steps,
    )


def new_model(settings: RunSettings, data: PreparedData) -> TransformerLM:
    """The untrained model of a run, as large as the settings say, for the tokenizer of the data."""
    model = create_model(settings.model, **settings.shape(), vocab_size=len(data.tokenizer))
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = data.tokenizer.eos_token_id
    return model
