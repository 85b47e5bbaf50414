"""What happens between two optimizer steps: when to log, evaluate, save and stop, and what the user sees of it."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from newllm.errors import UserError
from newllm.settings import RunSettings
from newllm.training.checkpoints import write_whole
from newllm.training.ranks import is_first, of_first, world_size

LOG_POINTS, LONGEST_LOG_WINDOW = 100, 25  # points of a loss curve, and the most steps one of them averages


class DivergedError(UserError):
    """A loss of training or validation that is not finite."""


@dataclass(frozen=True)
class TrainProgress:
    """Where a run stands; sent after every optimizer step."""

    model: str
    seed: int
    phase: str
    """Empty, or the name of the phase before the language model's."""
    step: int
    total_steps: int
    tokens: int
    loss: float | None
    """Training loss, mean over the last log window: in nats per token, or what the phase minimises."""
    val_loss: float | None
    tokens_per_second: float
    """Of this process, evaluations and checkpoints included."""
    seconds_left: float


@dataclass(frozen=True)
class Schedule:
    """The steps at which a run logs and evaluates: a function of the settings alone, so that a resumed run agrees."""

    total_steps: int
    log_every: int
    evaluations: int

    @classmethod
    def of(cls, total_steps: int, settings: RunSettings) -> Schedule:
        evaluations = settings.evaluations or 1
        if settings.epochs is not None:
            evaluations = max(evaluations, math.ceil(settings.epochs))
        return cls.evenly(total_steps, evaluations)

    @classmethod
    def evenly(cls, total_steps: int, evaluations: int) -> Schedule:
        """So many evaluations at equal distances, the last at the end; after each step where there are more."""
        log_every = min(max(1, total_steps // LOG_POINTS), LONGEST_LOG_WINDOW)
        return cls(total_steps, log_every, min(evaluations, total_steps))

    def evaluates_after(self, step: int) -> bool:
        """Whether it is round(n · total_steps / evaluations) for an n from 1 to evaluations. They are not listed: of a
        run that is to end by its patience alone, with epochs without number, they would fill the memory."""
        near = round(step * self.evaluations / self.total_steps)
        chosen = range(max(1, near - 1), min(self.evaluations, near + 1) + 1)
        return any(round(n * self.total_steps / self.evaluations) == step for n in chosen)


def evaluations_without_progress(log_history: list[dict[str, Any]]) -> int:
    """How many evaluations have passed since the best validation loss.

    Read from the log rather than counted, so that there is no counter to restore.
    """
    losses = [entry["eval_loss"] for entry in log_history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def out_of_patience(log_history: list[dict[str, Any]], settings: RunSettings) -> bool:
    return bool(settings.patience) and evaluations_without_progress(log_history) >= (settings.patience or 0)


class ScheduledFlow(TrainerCallback):
    """Decides after each step whether to log, evaluate, save or stop (takes the place of DefaultFlowCallback).

    A checkpoint is only written where the log window ends: the Trainer's running loss is then zero, so that there is
    nothing of it to save, and a resumed run logs exactly what an uninterrupted one does. Ctrl-C ends the flow: what is
    there is saved after the step that makes `interrupted` True.
    """

    def __init__(self, schedule: Schedule, checkpoint_minutes: float) -> None:
        self.schedule, self.checkpoint_minutes = schedule, checkpoint_minutes
        self.interrupted = False
        self.last_save = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step
        due = time.monotonic() - self.last_save >= 60 * self.checkpoint_minutes
        self.interrupted, due = of_first((self.interrupted, due))  # Ctrl-C comes to every process, in another step
        control.should_evaluate = self.schedule.evaluates_after(step)
        control.should_log = control.should_evaluate or self.interrupted or step % self.schedule.log_every == 0
        control.should_save = control.should_evaluate or self.interrupted or (control.should_log and due)
        control.should_training_stop = self.interrupted or step >= self.schedule.total_steps
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last_save = time.monotonic()

    @contextlib.contextmanager
    def saving_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C lets the step end, saves, and only then raises KeyboardInterrupt; a second one does not wait."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
            yield
            return

        def interrupt(signum: int, frame: Any) -> None:
            self.interrupted = True
            if world_size() == 1:  # torchrun passes on what the terminal has sent to all, and kills in the end
                signal.signal(signal.SIGINT, previous)

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.interrupted:
            raise KeyboardInterrupt


class FlowCallback(ScheduledFlow):
    """The flow of a language model: ends as well where a loss is not finite, or does not improve any more."""

    def __init__(self, settings: RunSettings, schedule: Schedule, precision: str, phase: str) -> None:
        super().__init__(schedule, settings.checkpoint_minutes)
        self.settings, self.precision, self.phase = settings, precision, phase

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        for key, what in (("loss", "training loss"), ("eval_loss", "validation loss")):
            if key in entry and not math.isfinite(entry[key]):
                during, flag = (f" of the {self.phase}", f"--{self.phase}-lr") if self.phase else ("", "--lr")
                remedy = f"try a lower {flag}, a longer --warmup-ratio or --precision float32"
                if key == "eval_loss" and any("residual" in entry for entry in state.log_history):
                    remedy = (
                        "by true recurrence the states grow beyond what training has seen: try --lagged-passes 2 "
                        f"--lagged-grad-passes 2, --lagged-deep-share 0.1, or a lower {flag}"
                    )
                raise DivergedError(
                    f"{self.settings.model}: the {what}{during} is {entry[key]} at step {state.global_step} "
                    f"(lr {self.settings.lr:g}, {self.precision}): {remedy}; the last checkpoint is kept"
                )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if out_of_patience(state.log_history, self.settings):
            control.should_training_stop = True
        return control


class MetricsCallback(TrainerCallback):
    """metrics.jsonl: one JSON object a line, of an entry of the Trainer's log.

    `train_loss` or `val_loss` by step, in nats per token; of action models a `score` in the place of `val_loss`.

    A first phase has a file of its own, in its own folder; its losses are what it minimises.

    Lagged Cache Training adds its residual (`training.lagged_cache`), the mean over the steps that a line stands for.

    A resumed run writes the file anew from the checkpoint's history, so no step is lost or there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_first():
            write_whole(self.path, "".join(map(metrics_line, state.log_history)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not is_first():
            return
        with self.path.open("a") as file:
            file.write(metrics_line(state.log_history[-1]))


def metrics_line(entry: dict[str, Any]) -> str:
    """An entry of the Trainer's log as a line of metrics.jsonl; its closing summary gives no line."""
    names = {"loss": "train_loss", "eval_loss": "val_loss", "eval_score": "score"}
    if not names.keys() & entry.keys():
        return ""
    order = ("step", "tokens", "loss", "eval_loss", "eval_score", "residual", "learning_rate", "grad_norm", "seconds")
    return json.dumps({names.get(key, key): entry[key] for key in order if key in entry}) + "\n"


class ProgressCallback(TrainerCallback):
    """Tells the caller after every step where the run stands."""

    def __init__(
        self,
        settings: RunSettings,
        schedule: Schedule,
        tokens_per_step: int,
        phase: str,
        on_progress: Callable[[TrainProgress], None],
    ) -> None:
        self.settings, self.schedule, self.tokens_per_step, self.phase = settings, schedule, tokens_per_step, phase
        self.on_progress = on_progress
        self.start, self.first_step = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = max(time.monotonic() - self.start, 1e-9)
        steps_per_second = (state.global_step - self.first_step) / seconds
        history = state.log_history
        self.on_progress(
            TrainProgress(
                model=self.settings.model,
                seed=self.settings.seed,
                phase=self.phase,
                step=state.global_step,
                total_steps=self.schedule.total_steps,
                tokens=state.global_step * self.tokens_per_step,
                loss=next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
                val_loss=next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None),
                tokens_per_second=steps_per_second * self.tokens_per_step,
                seconds_left=(self.schedule.total_steps - state.global_step) / steps_per_second,
            )
        )
