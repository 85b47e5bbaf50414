"""The Hugging Face Trainer for Vintix: data in the order of their indices, weights chosen by play, exact to resume."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from newllm.devices import autocast, resolve_device, resolve_precision
from newllm.settings import UserError
from newllm.training.callbacks import MetricsCallback, Schedule, ScheduledFlow
from newllm.training.checkpoints import checkpoint_folder, complete_folder, remove_except
from newllm.vintix.model import VintixModel
from newllm.vintix.settings import VintixRun

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class VintixProgress:
    """Where a run stands when it has been measured."""

    run: str
    step: int
    total_steps: int
    loss: float
    """Mean squared error over the last log window."""
    score: float
    """In-context score on the validation tasks."""
    seconds_left: float


class VintixFlow(ScheduledFlow):
    """The flow of an action model: ends as well where the loss is not finite."""

    def __init__(self, run: VintixRun) -> None:
        super().__init__(Schedule.evenly(run.steps, run.evaluations), run.checkpoint_minutes)
        self.run = run

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if not math.isfinite(entry.get("loss", 0.0)):
            raise UserError(
                f"{self.run.name}: the training loss is {entry['loss']} at step {state.global_step} "
                f"(lr {self.run.lr:g}): try a lower --lr or --precision float32; the last checkpoint is kept"
            )


class VintixTrainer(Trainer):
    """The Hugging Face Trainer; `score()` measures the model, and higher is better."""

    model: VintixModel

    def __init__(
        self,
        run: VintixRun,
        score: Callable[[VintixModel], float],
        on_progress: Callable[[VintixProgress], None] | None,
        folder: Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(args=training_arguments(run, folder), **kwargs)
        self.run_settings, self.score, self.on_progress = run, score, on_progress
        self.precision = resolve_precision(run.precision, self.args.device)
        self.flow = VintixFlow(run)
        self.seconds_before, self.started, self.first_step = 0.0, time.monotonic(), 0
        self.remove_callback(PrinterCallback)
        self.remove_callback(DefaultFlowCallback)
        self.add_callback(self.flow)
        self.add_callback(MetricsCallback(folder / "metrics.jsonl"))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """Item i of the data is a random window as it is: the order needs no chance of its own."""
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices; not biases, norms and pads, which are vectors."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        return autocast(self.args.device, self.precision)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not reported, and counting parameters in every step costs time."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The score on validation tasks, in the place where the Trainer expects a validation loss."""
        metrics = {"eval_score": self.score(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.on_progress is not None:
            step, total = self.state.global_step, self.run_settings.steps
            seconds = (time.monotonic() - self.started) / (step - self.first_step)
            loss = next(entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry)
            left = seconds * (total - step)
            self.on_progress(VintixProgress(self.run_settings.name, step, total, loss, metrics["eval_score"], left))
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["seconds"] = round(self.seconds_before + time.monotonic() - self.started, 3)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's, but complete or not there; keeps this checkpoint and the best one."""
        folder = Path(str(self.args.output_dir))
        with complete_folder(checkpoint_folder(folder, self.state.global_step)) as staging:
            save_weights(self.model, str(staging / WEIGHTS))
            self._save_optimizer_and_scheduler(str(staging))
            self._save_rng_state(str(staging))
            self.state.save_to_json(str(staging / "trainer_state.json"))
        remove_except(folder, {self.state.global_step, self.state.best_global_step or 0})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Strict, where the Trainer's own leaves a weight it does not find as it was initialised."""
        load_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS)

    def run(self, checkpoint: Path | None) -> TrainerState:
        """Trains to the end, from a checkpoint where there is one.

        The Trainer reads optimizer and random state of a checkpoint with torch.load(weights_only=True): the files are
        this run's own, in the user's own folder.
        """
        self.started = time.monotonic()
        if checkpoint is not None:
            state = read_state(checkpoint)
            self.seconds_before, self.first_step = state.log_history[-1]["seconds"], state.global_step
        with self.flow.saving_on_interrupt():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self.state


def read_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def training_arguments(run: VintixRun, folder: Path) -> TrainingArguments:
    device = resolve_device(run.device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        optim="adamw_torch_fused",
        learning_rate=run.lr,
        adam_beta1=run.adam_beta1,
        adam_beta2=run.adam_beta2,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        lr_scheduler_type="cosine_warmup_with_min_lr",  # the variant whose first step has a learning rate above 0
        lr_scheduler_kwargs={"min_lr_rate": run.min_lr_ratio},
        warmup_steps=run.warmup_ratio,  # below 1 it is a share of all optimizer steps
        metric_for_best_model="score",
        greater_is_better=True,
        save_strategy="steps",  # our flow decides when; with "no" the Trainer would not note the best step
        seed=run.seed,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    if arguments.parallel_mode.value == "not_distributed":
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process on several GPUs: DataParallel would alter the batch
    return arguments
