"""What a person sees while runs train: a live line for each in a terminal, plain lines now and then elsewhere."""

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
    """Shows the runs that are under way, and how many are done; a context manager.

    `start` gives the line of a run, `say` prints a line that stays.
    """

    def __init__(self, console: Console, total_runs: int) -> None:
        self.console, self.total_runs, self.done_runs = console, total_runs, 0
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self.overall = self.live.add_task("", total=total_runs, visible=total_runs > 1, figures="")
        self._show_done()

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

    def start(self, index: int, settings: RunSettings) -> RunLine:
        """The line of run `index` (from 0), which begins now."""
        return RunLine(self, self.label(index, settings))

    def label(self, index: int, settings: RunSettings) -> str:
        return f"[{index + 1}/{self.total_runs}] {settings.model}, seed {settings.seed}"

    def run_done(self) -> None:
        self.done_runs += 1
        self._show_done()

    def busy(self, what: str) -> None:
        """All runs are done; the comparison is busy with something that has no steps."""
        self.live.update(self.overall, description=what, visible=True)

    def _show_done(self) -> None:
        description = f"{self.done_runs} of {self.total_runs} runs done"
        self.live.update(self.overall, description=description, completed=self.done_runs)


class RunLine:
    """Shows one run: is the on_progress of `newllm.training.train`, and is told of what has no steps by `phase`."""

    def __init__(self, display: Display, label: str) -> None:
        self.display, self.label = display, label
        self.task = display.live.add_task(escape(label), total=None, figures="preparing")
        self.last_line = time.monotonic()

    def phase(self, what: str) -> None:
        self.display.live.update(self.task, figures=what)

    def say(self, text: str) -> None:
        """Prints a line about this run that stays."""
        self.display.say(f"{self.label}: {text}")

    def __call__(self, progress: TrainProgress) -> None:
        figures = f"{progress.phase + ' ' if progress.phase else ''}step {progress.step:,}/{progress.total_steps:,}"
        if progress.loss is not None:
            figures += f"  loss {progress.loss:.3f}"
        if progress.val_loss is not None:
            figures += f"  validation {progress.val_loss:.3f}"
        figures += f"  {progress.tokens_per_second:,.0f} tokens/s  {duration(progress.seconds_left)} left"
        if self.display.console.is_terminal:
            self.display.live.update(self.task, completed=progress.step, total=progress.total_steps, figures=figures)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            self.display.say(f"{self.label}  {figures}")

    def end(self) -> None:
        """The run is over; its line goes."""
        self.display.live.remove_task(self.task)
