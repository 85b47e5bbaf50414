"""What a person sees while a comparison runs: a live line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from newllm.settings import RunSettings
from newllm.training.callbacks import TrainProgress

PLAIN_LINE_SECONDS = 10


def duration(seconds: float) -> str:
    """'3:07', or '1:02:09' from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Shows the runs of a comparison one after the other; a context manager.

    `start` announces a run, the object itself is the on_progress of `newllm.training.train`, `say` prints a line.
    """

    def __init__(self, console: Console, total_runs: int) -> None:
        self.console, self.total_runs = console, total_runs
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self.task = self.live.add_task("", total=1, visible=False, figures="")
        self.run, self.last_line = "", 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def start(self, index: int, settings: RunSettings) -> None:
        """Run `index` (from 0) begins."""
        self.run = f"[{index + 1}/{self.total_runs}] {settings.model}, seed {settings.seed}"
        self.phase("preparing")
        self.last_line = time.monotonic()

    def phase(self, what: str) -> None:
        """The run is busy with something that has no steps."""
        self.live.update(self.task, description=escape(self.run), total=None, figures=what, visible=True)

    def __call__(self, progress: TrainProgress) -> None:
        figures = f"step {progress.step:,}/{progress.total_steps:,}"
        if progress.loss is not None:
            figures += f"  loss {progress.loss:.3f}"
        if progress.val_loss is not None:
            figures += f"  validation {progress.val_loss:.3f}"
        figures += f"  {progress.tokens_per_second:,.0f} tokens/s  {duration(progress.seconds_left)} left"
        if self.console.is_terminal:
            self.live.update(self.task, completed=progress.step, total=progress.total_steps, figures=figures)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            self.say(f"{self.run}  {figures}")
