"""Worker processes, seen from the process that drives them: how to start one, call it, and tell how it died."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

# The time a process that has closed its output is given to end: a large one takes a while.
DEATH_SECONDS = 10.0


class WorkerError(RuntimeError):
    """A worker failed or died: one line that says what happened."""


class Worker:
    """Driver's end of a measuring process (`worker.py`); `call` runs one command and waits for its answer."""

    module = "newllm.evaluation.worker"

    def __init__(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """environment: variables of the process that are not as in this one."""
        self.name = name
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env=os.environ | (environment or {}),
        )

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Raises WorkerError with one line if the command fails or the process dies."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": command, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or half an answer
            raise WorkerError(f"{self.name}: {command}: {cause_of_death(self.process, self.errors)}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {command}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def cause_of_death(process: subprocess.Popen[str], errors: IO[str]) -> str:
    """One line on how a process ended, or is about to end: its signal, or its exit code and last line of `errors`."""
    try:
        code = process.wait(DEATH_SECONDS)
    except subprocess.TimeoutExpired:
        return "the process no longer answers, though it still runs"
    if code == -signal.SIGKILL:
        return f"the process was killed (signal {-code}): out of memory?"
    if code < 0:
        return f"the process was killed (signal {-code}, {signal.Signals(-code).name})"
    errors.seek(0)
    said = errors.read().strip().splitlines()
    return f"the process ended with code {code}" + (f": {said[-1]}" if said else "")
