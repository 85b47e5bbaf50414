"""How a measuring process that died is told."""

import signal
import subprocess
import sys
import tempfile

import pytest

from newllm.evaluation import processes


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "the process ended with code 3"),
        ("1 / 0", "the process ended with code 1: ZeroDivisionError: division by zero"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})", "the process was killed (signal 15, SIGTERM)"),
        (
            f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})",
            "the process was killed (signal 9): out of memory?",
        ),
    ],
)
def test_a_death_is_told_in_one_line(code, said):
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=errors, text=True)
        assert processes.cause_of_death(process, errors) == said


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('{\"seconds\": [1.', end='', flush=True); os._exit(3)", "the process ended with code 3"),
        ("os.close(1); time.sleep(60)", "the process no longer answers, though it still runs"),
    ],
)
def test_a_worker_that_answers_nothing_or_half_is_told_in_one_line(code, said, monkeypatch):
    start = subprocess.Popen
    command = [sys.executable, "-c", f"import os, time; {code}"]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start(command, **options))
    monkeypatch.setattr(processes, "DEATH_SECONDS", 0.2 if "sleep" in code else 60.0)
    worker = processes.Worker("gqa")
    try:
        with pytest.raises(processes.WorkerError) as error:
            worker.call("train")
        assert str(error.value) == f"gqa: train: {said}"
    finally:
        worker.close()


def test_a_worker_has_the_variables_it_is_given_and_all_others(monkeypatch):
    start, code = subprocess.Popen, "import json, os; print(json.dumps([os.environ[n] for n in ('GIVEN', 'OTHER')]))"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start([sys.executable, "-c", code], **options))
    monkeypatch.setenv("OTHER", "as it is")
    worker = processes.Worker("gqa", {"GIVEN": "new"})
    try:
        assert worker.process.communicate()[0] == '["new", "as it is"]\n'
    finally:
        worker.close()
