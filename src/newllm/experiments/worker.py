"""A process that trains and evaluates runs of a comparison, one after the other, while others do the same beside it.

Started by `jobs.Worker` as `python -m newllm.experiments.worker`. It reads one JSON object a line from standard input:
first what all runs share, {"plugin", "threads", "data"}; then one {"run", "folder"} at a time, or {"interrupt": true}.
It answers with JSON lines: {"progress"}, {"phase"} or {"say"} on the way, {"done"} or {"error"} at the end of a run.

Standard input is also the rope to the process that started it: when that ends, however it does, input ends, and the
worker with it, at once. A later start of the same command then finds nobody in its folders.
"""

from __future__ import annotations

import _thread
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

INTERRUPTED = 130


class Reporter:
    """Tells the starting process how the run gets on."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers

    def send(self, **message: Any) -> None:
        try:
            print(json.dumps(message), file=self.answers, flush=True)
        except BrokenPipeError:  # nobody is there any more, and nothing may be written on the way out
            os._exit(INTERRUPTED)

    def __call__(self, progress: Any) -> None:
        self.send(progress=dataclasses.asdict(progress))

    def phase(self, what: str) -> None:
        self.send(phase=what)

    def say(self, text: str) -> None:
        self.send(say=text)


def read_commands(commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hands on what standard input says; an interrupt reaches the main thread as Ctrl-C does."""
    for line in sys.stdin:
        if not line.endswith("\n"):
            break  # who wrote it was killed
        command = json.loads(line)
        if "interrupt" in command:
            _thread.interrupt_main()
        commands.put(command)  # an interrupt too: it wakes a main thread that waits here
    os._exit(INTERRUPTED)


def work(commands: queue.SimpleQueue[dict[str, Any]], reporter: Reporter) -> None:
    from newllm.data.preparation import load_prepared
    from newllm.devices import prepare_process
    from newllm.errors import UserError
    from newllm.experiments.run import error_line, finish_run
    from newllm.models import load_plugin
    from newllm.settings import RunSettings

    shared = commands.get()
    prepare_process(shared["threads"])
    if shared["plugin"] is not None:
        load_plugin(shared["plugin"])
    data = load_prepared(Path(shared["data"]))
    while True:
        command = commands.get()
        if "interrupt" in command:
            return
        try:
            finish_run(RunSettings(**command["run"]), data, Path(command["folder"]), reporter)
        except Exception as error:  # one broken model must not cost the others their results
            reporter.send(error=error_line(error), is_user_error=isinstance(error, UserError))
        else:
            reporter.send(done=True)


def main() -> None:
    # Answers go to the pipe that was standard output; whatever a library prints goes to standard error.
    reporter = Reporter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=read_commands, args=(commands,), daemon=True).start()
    code = INTERRUPTED
    try:
        work(commands, reporter)
    except KeyboardInterrupt:  # the trainer has saved the state
        pass
    except Exception:
        traceback.print_exc()
        code = 1
    os._exit(code)  # an ordinary end would wait for the thread that waits for input


if __name__ == "__main__":
    main()
