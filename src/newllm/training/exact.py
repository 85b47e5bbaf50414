"""The Hugging Face Trainer, made exact to resume, whatever it trains.

What is ours: autocast by the function that evaluation uses too, checkpoints that are complete or not there, and a
`callbacks.ScheduledFlow` that says when to log, evaluate, save and stop. The rest is the Trainer's: the step itself,
clipping, accumulation, the optimizer's and the learning rate's state, DDP through accelerate.

An interrupted run ends bit for bit as it would have, where what a subclass adds is in its checkpoints (`save_more`) and
its data come in an order that the number of a batch decides.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from transformers import DefaultFlowCallback, PrinterCallback, Trainer, TrainerState, TrainingArguments

from newllm.devices import autocast, resolve_device
from newllm.errors import UserError
from newllm.training.callbacks import ScheduledFlow
from newllm.training.checkpoints import (
    checkpoint_folder,
    complete_checkpoint,
    damaged_files,
    incomplete,
    newest_checkpoint,
    remove_except,
)
from newllm.training.ranks import is_first, of_first, wait, world_size

WEIGHTS, STATE = "model.safetensors", "trainer_state.json"  # in a checkpoint


class OptimizerSettings(Protocol):
    """What the settings of every kind of run have in common."""

    batch_size: Any
    """An int: rows of a micro-batch."""
    gradient_accumulation: int
    lr: Any
    """A float: the peak learning rate."""
    warmup_ratio: float
    min_lr_ratio: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    max_grad_norm: float
    seed: int
    device: str


class ExactTrainer(Trainer):
    """The Hugging Face Trainer with this project's precision, schedule and checkpoints."""

    model: torch.nn.Module

    def __init__(self, *, flow: ScheduledFlow, precision: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flow, self.precision = flow, precision
        self.seconds_before, self.started, self.first_step = 0.0, time.monotonic(), 0
        self.remove_callback(PrinterCallback)
        self.remove_callback(DefaultFlowCallback)
        self.add_callback(flow)

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def save_more(self, staging: Path) -> None:
        """For a subclass: writes into a checkpoint what else a continuation needs."""

    def saved(self, checkpoint: Path) -> None:
        """For a subclass: the checkpoint is complete, and those it replaces are about to be removed."""

    def load_more(self, checkpoint: Path) -> None:
        """For a subclass: reads what `save_more` has written."""

    def is_done(self, state: TrainerState) -> bool:
        """Whether nothing is left to train after a checkpoint with this state."""
        return state.global_step >= self.flow.schedule.total_steps

    def finish(self) -> TrainerState:
        """Trains to the end, from the newest checkpoint where there is one; the model then has the best weights.

        Does nothing but load them if called again.

        Raises:
            KeyboardInterrupt: on Ctrl-C, with the state saved.
            UserError: the best weights, or all checkpoints, are damaged or gone.
        """
        newest = newest_checkpoint(self.folder)
        state = None if newest is None else read_state(newest)
        if state is None or not self.is_done(state):
            state = self._run(newest, state)
        best = checkpoint_folder(self.folder, state.best_global_step) / WEIGHTS  # type: ignore[arg-type]
        if not best.is_file() or best in damaged_files(best.parent):
            raise UserError(
                f"{best} is damaged or gone, the best weights of this run: remove {self.folder} to train anew"
            )
        load_weights(self.model, best)
        wait()  # the first process may remove the checkpoints now
        return state

    def _run(self, checkpoint: Path | None, state: TrainerState | None) -> TrainerState:
        """Trains to the end, from a checkpoint with this state where there is one.

        The Trainer reads optimizer and random state of a checkpoint with torch.load(weights_only=True): the files are
        this run's own, in the user's own folder.
        """
        self.started = time.monotonic()
        if state is not None:
            self.seconds_before, self.first_step = state.log_history[-1]["seconds"], state.global_step
        with self.flow.saving_on_interrupt():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self.state

    def measure(self) -> dict[str, float]:
        """For a subclass: the figure by which the best weights are chosen, as `eval_…`."""
        raise NotImplementedError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = of_first(self.measure() if is_first() else {})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["seconds"] = round(self.seconds_before + time.monotonic() - self.started, 3)
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices, embeddings among them; not biases, norms, gates and pads, which are vectors."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Our own autocast instead of accelerate's, which would patch the model's forward and upcast its outputs."""
        return autocast(self.args.device, self.precision)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not reported, and counting parameters in every step costs time."""
        return 0

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's, but complete or not there; keeps this checkpoint and the best one."""
        checkpoint = checkpoint_folder(self.folder, self.state.global_step)
        if is_first():
            with complete_checkpoint(checkpoint) as staging:
                save_weights(self.model, str(staging / WEIGHTS))
                self.save_more(staging)
                self._save_optimizer_and_scheduler(str(staging))
                self._save_rng_states(staging)
                self.state.save_to_json(str(staging / STATE))
            self.saved(checkpoint)
            remove_except(self.folder, {self.state.global_step, self.state.best_global_step or 0})
        else:
            self._save_rng_states(incomplete(checkpoint))
        wait()

    def _save_rng_states(self, staging: Path) -> None:
        """Every process its own, when the first has made the folder and before it is complete."""
        wait()
        self._save_rng_state(str(staging))
        wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Strict, where the Trainer's own leaves a weight it does not find as it was initialised."""
        load_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS)
        self.load_more(Path(resume_from_checkpoint))


def read_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / STATE))


def common_arguments(settings: OptimizerSettings, folder: Path, steps: int, **own: Any) -> TrainingArguments:
    """Those of every run, with the kind's own beside them."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        optim="adamw_torch_fused",
        learning_rate=settings.lr,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="cosine_warmup_with_min_lr",  # the variant whose first step has a learning rate above 0
        lr_scheduler_kwargs={"min_lr_rate": settings.min_lr_ratio},
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of all optimizer steps
        save_strategy="steps",  # our flow decides when; with "no" the Trainer would not note the best step
        seed=settings.seed,
        use_cpu=resolve_device(settings.device).type == "cpu",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        average_tokens_across_devices=world_size() > 1,
        **own,
    )
    if arguments.parallel_mode.value == "not_distributed":
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process on several GPUs: DataParallel would alter the batch
    return arguments
