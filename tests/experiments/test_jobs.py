"""Several runs at a time: the rows of one at a time, and nobody is left behind however it ends."""

import io
import multiprocessing
import os
import queue
import shlex
import signal
import sys
import time
import types

import psutil
import pytest
import torch
from rich.console import Console
from tiny_runs import STEP, tiny_comparison

from newllm.cli import main
from newllm.errors import UserError
from newllm.experiments import jobs, worker
from newllm.experiments.command_line import command_line
from newllm.experiments.compare import compare
from newllm.experiments.progress import Display
from newllm.experiments.results import read_results
from newllm.experiments.run import RunError
from newllm.resolution import resolve
from newllm.training.checkpoints import checkpoints, read_result, write_result

PLUGIN = """
import os, signal
from newllm.models.layers.base import Layer, register_layer
from newllm.errors import UserError

class Broken(Layer):
    def __init__(self, hidden_size, num_heads, intermediate_size):
        super().__init__()

@register_layer("jobs_bug")
class Bug(Broken):
    def forward(self, x, *, positions, mask, state):
        raise ZeroDivisionError("nothing to divide by")

@register_layer("jobs_wrong_input")
class WrongInput(Broken):
    def forward(self, x, *, positions, mask, state):
        raise UserError("choose another width")

@register_layer("jobs_out_of_memory")
class OutOfMemory(Broken):
    def forward(self, x, *, positions, mask, state):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def tiny(text):
    """A function that gives the settings of a tiny comparison, with one evaluation and so one regular checkpoint."""
    (text / "broken.py").write_text(PLUGIN)
    own = {"evaluations": 1, "max_tokens": 150 * STEP, "plugin": str(text / "broken.py"), "jobs": 2}

    def settings(out, **changes):
        return resolve(tiny_comparison(text, out, **own | changes))

    return settings


def figures(out):
    """The rows without what depends on the clock."""
    rows = read_results(out)["rows"]
    for record in [*rows, *(point for row in rows for point in row["curve"])]:
        record.pop("seconds")
    return rows


@pytest.fixture(scope="module")
def one_at_a_time(tiny, tmp_path_factory):
    return figures(compare(tiny(tmp_path_factory.mktemp("alone") / "out", jobs=1)).parent)


def test_side_by_side_gives_the_same_rows_and_outlives_what_fails(tiny, one_at_a_time, tmp_path):
    failing = ["jobs_wrong_input", "jobs_out_of_memory", "jobs_bug"]
    out = compare(tiny(tmp_path / "out", models=[*failing, "pythia", "mqa"])).parent
    assert figures(out) == one_at_a_time
    assert {failure["model"]: failure["error"] for failure in read_results(out)["failed"]} == {
        "jobs_wrong_input": "choose another width",
        "jobs_out_of_memory": "the process was killed (signal 9): out of memory?",
        "jobs_bug": "ZeroDivisionError: nothing to divide by",
    }
    for model in failing:
        assert (out / f"{model}-seed0" / "error.txt").is_file()
    assert not psutil.Process().children()


def test_wrong_input_found_in_a_worker_is_wrong_input_here(tiny, tmp_path):
    with pytest.raises(UserError, match="choose another width"):
        compare(tiny(tmp_path / "out", models=["jobs_wrong_input"]))


def start(settings):
    """The command in a process of its own: forked, since loading torch again takes longer than the run."""
    process = multiprocessing.get_context("fork").Process(target=run_command, args=(settings,))
    process.start()
    return process


def run_command(settings):
    sys.stderr = open(f"{settings.out}.errors", "a", buffering=1)  # noqa: SIM115 (the process ends with it)
    os._exit(main(shlex.split(command_line(settings))[1:]))


def wait_for_training(folders, since, process):
    """Until both runs have begun, or gone on, to train."""
    files = [folder / "metrics.jsonl" for folder in folders]
    while not all(file.is_file() and file.stat().st_mtime_ns > since for file in files):
        assert process.is_alive()
        time.sleep(0.01)


def test_interrupted_and_killed_it_ends_as_if_nothing_had_happened(tiny, one_at_a_time, tmp_path):
    settings = tiny(tmp_path / "out")
    folders = [tmp_path / "out" / f"{model}-seed0" for model in settings.models]

    process = start(settings)
    wait_for_training(folders, 0, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(600)
    assert process.exitcode == 130
    for folder in folders:
        assert checkpoints(folder) or "training" in read_result(folder)
        assert not folder.with_name(folder.name + ".newllm-lock").exists()
    said = (tmp_path / "out.errors").read_text()
    assert said.strip() == "newllm: interrupted; the same command continues where it was"

    begun = time.time_ns()
    process = start(settings)
    wait_for_training(folders, begun, process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.join()
    for process in workers:
        assert not running(process, seconds=2)

    process = start(settings)
    process.join(600)
    assert process.exitcode == 0
    assert figures(tmp_path / "out") == one_at_a_time
    assert "Traceback" not in (tmp_path / "out.errors").read_text()


def running(process, seconds):
    """Whether it still runs after that time; an ended process whose parent is gone may stay as a zombie."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("changes", "gigabytes", "expected"),
    [
        ({"threads": None, "jobs": None}, 64, (2, 4)),  # two runs
        ({"threads": None, "jobs": None, "seeds": [0, 1, 2, 3, 4]}, 64, (8, 1)),  # eight cores
        ({"threads": None, "jobs": None, "seeds": [0, 1, 2, 3, 4]}, 23, (5, 1)),  # memory
        ({"threads": 4, "jobs": None, "seeds": [0, 1]}, 64, (2, 4)),
        ({"threads": None, "jobs": 3, "seeds": [0, 1]}, 1, (3, 2)),
        ({"threads": None, "jobs": 8}, 1, (2, 4)),  # two runs
        ({"threads": 16, "jobs": None}, 1, (1, 16)),
    ],
)
def test_jobs_and_their_threads(tiny, tmp_path, monkeypatch, changes, gigabytes, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    memory = psutil.virtual_memory()._replace(total=gigabytes * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert jobs.resolve_jobs(tiny(tmp_path, device="cpu", **changes)) == expected


def test_zero_jobs_are_wrong_input(tiny, tmp_path):
    with pytest.raises(UserError, match="--jobs is 0"):
        tiny(tmp_path, jobs=0)


def test_a_worker_killed_in_the_middle_of_an_answer_is_a_dead_worker():
    killed, answers = object.__new__(jobs.Worker), queue.SimpleQueue()
    killed.process = types.SimpleNamespace(stdout=io.StringIO('{"line": 1}\n{"li'))
    killed._listen(answers)
    assert [answers.get_nowait()[1], answers.get_nowait()[1]] == [{"line": 1}, None]


def test_a_command_that_was_cut_off_ends_the_worker(monkeypatch):
    ended, commands = [], queue.SimpleQueue()
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"run": 1}\n{"ru'))
    monkeypatch.setattr(os, "_exit", ended.append)
    worker.read_commands(commands)
    assert (commands.get_nowait(), ended) == ({"run": 1}, [worker.INTERRUPTED])


class ScriptedWorker(jobs.Worker):
    """Answers a run at once, with what the script has for it; None is its death."""

    script: dict
    begun: list

    def __init__(self, answers):
        self.task = self.line = None
        self.answers, self.errors = answers, io.StringIO("Killed")
        self.process = types.SimpleNamespace(wait=lambda: None)
        self.begun.append(self)

    def send(self, **command):
        if "run" in command:
            for answer in self.script[command["run"]["model"]]:
                self.answers.put((self, answer))

    def close(self):
        pass


def test_what_workers_say_is_shown_and_a_dead_one_is_replaced(tiny, tmp_path, monkeypatch):
    settings = tiny(tmp_path, models=["a", "b", "c", "d"])
    tasks = [jobs.Task(index, run, tmp_path / run.model) for index, run in enumerate(settings.runs())]
    (tmp_path / "a").mkdir()
    write_result(tmp_path / "a", {"row": {"model": "a"}})
    ScriptedWorker.begun = []
    ScriptedWorker.script = {
        "a": [{"phase": "evaluating"}, {"say": "almost"}, {"done": True}],
        "b": [None],
        "c": [{"error": "no", "is_user_error": False}],
        "d": [{"error": "wrong", "is_user_error": True}],
    }
    monkeypatch.setattr(jobs, "Worker", ScriptedWorker)
    monkeypatch.setattr(jobs, "cause_of_death", lambda process, errors: "it was killed")
    data = types.SimpleNamespace(tokenizer_dir=tmp_path / "data" / "tokenizer")
    display = Display(Console(file=io.StringIO(), width=200), len(tasks))
    with jobs.Workers(2, 1, data, display) as workers:
        ended = {task.run.model: outcome for task, outcome in workers.finish(tasks)}
    assert list(ended) == ["a", "b", "c", "d"]
    assert ended["a"] == {"model": "a"}
    assert [(type(ended[name]), str(ended[name])) for name in "bcd"] == [
        (RunError, "it was killed"),
        (RunError, "no"),
        (UserError, "wrong"),
    ]
    assert len(ScriptedWorker.begun) == 3, "one in place of the dead one"
    assert "[1/4] a, seed 0: almost" in display.console.file.getvalue()
    assert (tmp_path / "b" / "error.txt").read_text() == "Killed\nit was killed\n"
