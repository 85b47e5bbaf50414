"""Runs one after the other in this process, or several at a time in processes of their own.

Small models do not keep all cores busy: two runs on one thread each train more tokens a second than one run on two.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from newllm.devices import resolve_device
from newllm.errors import UserError
from newllm.evaluation.processes import cause_of_death
from newllm.experiments.progress import Display, RunLine
from newllm.experiments.results import Row
from newllm.experiments.run import RunError, finish_run, leave_error
from newllm.settings import ExperimentSettings, RunSettings
from newllm.training.callbacks import TrainProgress
from newllm.training.checkpoints import read_result

if TYPE_CHECKING:
    from newllm.data import PreparedData

MEMORY_OF_A_JOB = 4 * 2**30  # bytes; `--jobs` says so


@dataclass(frozen=True)
class Task:
    """A run that is still to be done."""

    index: int
    run: RunSettings
    folder: Path


def resolve_jobs(settings: ExperimentSettings) -> tuple[int, int]:
    """How many runs train at the same time, and on how many threads each.

    A function of settings and machine alone, not of how many runs are left: a continued comparison goes on with as many
    threads as before, and so bit-equal.
    """
    threads = torch.get_num_threads()
    if settings.jobs is not None:
        jobs = settings.jobs
    elif resolve_device(settings.device).type == "cpu":
        by_memory = psutil.virtual_memory().total // MEMORY_OF_A_JOB
        jobs = max(1, min(threads // (settings.threads or 1), by_memory))
    else:
        jobs = 1
    jobs = min(jobs, len(settings.runs()))  # the threads of a job without a run would be idle
    return jobs, settings.threads or max(1, threads // jobs)


def finish_here(tasks: list[Task], data: PreparedData, display: Display) -> Iterator[tuple[Task, Row | Exception]]:
    """Does the runs in this process; yields each with its row, or with what went wrong."""
    for task in tasks:
        line = display.start(task.index, task.run)
        outcome: Row | Exception
        try:
            outcome = finish_run(task.run, data, task.folder, line)
        except Exception as error:  # one broken model must not cost the others their results
            outcome = error
        line.end()
        yield task, outcome


class Worker:
    """This side of a worker process (`worker.py`); what it says is put on `answers`, and None when it has ended."""

    def __init__(self, answers: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]]) -> None:
        self.task: Task | None = None
        self.line: RunLine | None = None
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "newllm.experiments.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            process_group=0,  # Ctrl-C in the terminal reaches this process alone, which hands it on once
        )
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break  # killed while it answered
                answers.put((self, json.loads(line)))
        answers.put((self, None))

    def send(self, **command: Any) -> None:
        """A worker that has died takes no command; that it has is told by its answers."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=self.process.stdin, flush=True)

    def start(self, task: Task, line: RunLine) -> None:
        self.task, self.line = task, line
        self.send(run=dataclasses.asdict(task.run), folder=str(task.folder))

    def show(self, answer: dict[str, Any]) -> bool:
        """Shows what the run says on its way; False where the answer is its end."""
        assert self.line is not None
        if "progress" in answer:
            self.line(TrainProgress(**answer["progress"]))
        elif "phase" in answer:
            self.line.phase(answer["phase"])
        elif "say" in answer:
            self.line.say(answer["say"])
        else:
            return False
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.errors.close()


class Workers:
    """Does runs in several worker processes at a time; a context manager that leaves none of them behind."""

    def __init__(self, jobs: int, threads: int, data: PreparedData, display: Display) -> None:
        self.jobs, self.threads, self.data, self.display = jobs, threads, data, display
        self.answers: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self.workers: list[Worker] = []

    def __enter__(self) -> Workers:
        return self

    def finish(self, tasks: list[Task]) -> Iterator[tuple[Task, Row | Exception]]:
        """Yields each run with its row, or with what went wrong, in the order in which they end."""
        waiting = collections.deque(tasks)
        for _ in range(min(self.jobs, len(tasks))):
            self._start(waiting.popleft())
        while any(worker.task for worker in self.workers):
            worker, answer = self.answers.get()
            if worker.task is None:  # it has died after its last run
                continue
            if answer is not None and worker.show(answer):
                continue
            assert worker.line is not None
            worker.line.end()
            task, worker.task = worker.task, None
            outcome = self._outcome(worker, task, answer)
            if answer is None:
                self.workers.remove(worker)
                worker.close()
            if waiting:
                self._start(waiting.popleft(), None if answer is None else worker)
            yield task, outcome

    def _start(self, task: Task, worker: Worker | None = None) -> None:
        """Begins a run, in a new process unless there is one that waits."""
        if worker is None:
            worker = Worker(self.answers)
            self.workers.append(worker)
            worker.send(plugin=task.run.plugin, threads=self.threads, data=str(self.data.tokenizer_dir.parent))
        worker.start(task, self.display.start(task.index, task.run))

    def _outcome(self, worker: Worker, task: Task, answer: dict[str, Any] | None) -> Row | Exception:
        if answer is None:
            cause = cause_of_death(worker.process, worker.errors)
            worker.errors.seek(0)
            leave_error(task.folder, f"{worker.errors.read()}\n{cause}\n")
            return RunError(cause)
        if "error" in answer:
            return (UserError if answer["is_user_error"] else RunError)(answer["error"])
        return read_result(task.folder)["row"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets the workers save their state and end; a second Ctrl-C does not wait for that."""
        if any(worker.task for worker in self.workers):
            self.display.say("saving the state of the runs under way; Ctrl-C again does not wait for it")
        try:
            for worker in self.workers:
                worker.send(interrupt=True)
            for worker in self.workers:
                worker.process.wait()
        finally:
            for worker in self.workers:
                worker.close()
