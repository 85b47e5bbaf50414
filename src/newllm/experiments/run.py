"""One run of a comparison from beginning to end, in whichever process: train, evaluate, store the row."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from newllm.errors import UserError, first_line
from newllm.experiments.rows import make_row
from newllm.settings import RunSettings
from newllm.training import train
from newllm.training.callbacks import TrainProgress
from newllm.training.checkpoints import ERROR_FILE, claim_run_folder, read_result, write_result
from newllm.training.locks import lock

if TYPE_CHECKING:
    from newllm.data import PreparedData


class RunError(RuntimeError):
    """One run failed in a process of its own, or all runs did; the message says how, in one line."""


class Watcher(Protocol):
    """Is told how a run gets on."""

    def __call__(self, progress: TrainProgress) -> None: ...

    def phase(self, what: str) -> None:
        """The run is busy with something that has no steps."""

    def say(self, text: str) -> None:
        """Something the user should know."""


def is_finished(result: dict[str, Any], run: RunSettings) -> bool:
    """Whether a run folder's result.json holds the row of exactly this run; training alone may be older."""
    row = result.get("row")
    return isinstance(row, dict) and row.get("hash") == run.hash()


def finish_run(run: RunSettings, data: PreparedData, folder: Path, watcher: Watcher) -> dict[str, Any]:
    """Trains, or continues, and evaluates a run; returns its row, which result.json then holds too.

    Whatever goes wrong once the folder is that of the run is left in error.txt, and raised.
    """
    with lock(folder):
        claim_run_folder(folder, run, data.fingerprint, watcher.say)
        try:
            training = train(run, data, folder, watcher)
            watcher.phase("evaluating")
            row = make_row(run, data, folder, training)
            write_result(folder, read_result(folder) | {"row": row})
        except Exception:
            leave_error(folder, traceback.format_exc())
            raise
        (folder / ERROR_FILE).unlink(missing_ok=True)
    return row


def leave_error(folder: Path, text: str) -> None:
    """Writes error.txt, as far as the disk that may be the trouble allows: the trouble itself is to be told."""
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)  # a worker may have died before it made the folder
        (folder / ERROR_FILE).write_text(text, encoding="utf-8")


def with_details(line: str, folder: Path) -> str:
    """What went wrong with a run, and where more of it stands, if it does."""
    path = folder / ERROR_FILE
    return f"{line} (details: {path})" if path.is_file() else line


def error_line(error: Exception) -> str:
    """What the results say of a failed run."""
    line = first_line(error)
    return line if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {line}"
