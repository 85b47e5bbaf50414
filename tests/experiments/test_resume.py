"""kill -9, then the same command again: the weights and the validation loss of an uninterrupted run, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from newllm.cli import main
from newllm.models import TransformerLM
from newllm.training import exact, run


@pytest.fixture(scope="module")
def flags(text):
    """Flags of a tiny run that writes a checkpoint at every opportunity."""
    shape = "--hidden-size 32 --num-layers 2 --num-heads 2 --intermediate-size 64 --vocab-size 300 --seq-length 32"
    budget = f"--batch-size 4 --max-tokens {120 * 4 * 32} --evaluations 5 --checkpoint-minutes 0 --threads 1"
    return [*shape.split(), *budget.split(), "--data", str(text / "play.txt"), "--cache-dir", str(text / "cache")]


@pytest.fixture(scope="module")
def two_phase_flags(flags):
    """The same with a phase before the language model's, and a shorter budget for each of them."""
    return [*flags, "--model", "v_dproj_restore_two_phase", "--max-tokens", str(30 * 4 * 32)]


@pytest.fixture(scope="module")
def two_phases_uninterrupted(two_phase_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "two"
    assert main(["train", *two_phase_flags, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *flags, "--out", str(folder)]) == 0
    return folder


def start(flags, folder, prepare=lambda: None):
    """The command in a process of its own: forked, since loading torch again takes longer than the run."""

    def child():
        prepare()
        os._exit(main(["train", *flags, "--out", str(folder)]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def outcome(folder):
    """Everything a finished run leaves that does not depend on the clock."""
    result = json.loads((folder / "result.json").read_text())
    phases = [result[phase] for phase in ("reconstruction", "training") if phase in result]
    files = sorted(folder.rglob("metrics.jsonl"))
    assert len(files) == len(phases)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for record in (*phases, *lines):
        record.pop("seconds")
        record.pop("tokens_per_second", None)
    return phases, lines, (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(flags, uninterrupted, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    for kill in (True, True, True, True, False):
        process = start(flags, folder)
        if kill:
            time.sleep(rng.uniform(0.05, 1.0))
            os.kill(process.pid, signal.SIGKILL)
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
    assert outcome(folder) == outcome(uninterrupted)
    assert sorted(os.listdir(folder)) == ["config.yaml", "metrics.jsonl", "model", "result.json"]


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_at_the_worst_moments(flags, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    moments = [
        (run, "claim_run_folder", []),  # before anything
        (exact.ExactTrainer, "_save_rng_state", ["checkpoint-1.incomplete"]),  # in the middle of the first checkpoint
        (exact, "remove_except", ["checkpoint-1"]),  # just after it became complete
        (exact, "read_state", ["checkpoint-1"]),  # when it is about to continue
        (run, "write_result", ["checkpoint-120", "model"]),  # between the model and its result.json
    ]
    for where, name, left in moments:
        process = start(flags, folder, lambda where=where, name=name: setattr(where, name, die))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        found = [path.name for path in folder.glob("*") if path.is_dir()]
        assert set(left) <= set(found)
    process = start(flags, folder)
    process.join(120)
    assert outcome(folder) == outcome(uninterrupted)
    assert sorted(os.listdir(folder)) == ["config.yaml", "metrics.jsonl", "model", "result.json"]


@pytest.mark.parametrize("seed", range(2))
def test_two_phases_killed_at_random_moments(two_phase_flags, two_phases_uninterrupted, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    for kill in (True, True, True, True, False):
        process = start(two_phase_flags, folder)
        if kill:
            time.sleep(rng.uniform(0.05, 1.0))
            os.kill(process.pid, signal.SIGKILL)
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
    assert outcome(folder) == outcome(two_phases_uninterrupted)


def test_two_phases_killed_at_the_worst_moments(two_phase_flags, two_phases_uninterrupted, tmp_path):
    folder = tmp_path / "run"
    first = "reconstruction"
    moments = [
        (exact.ExactTrainer, "_save_rng_state", [f"{first}/checkpoint-1.incomplete"]),  # in the first phase
        (exact, "remove_except", [f"{first}/checkpoint-1"]),  # at its first complete checkpoint
        (exact, "read_state", [f"{first}/checkpoint-1"]),  # when it is about to continue
        (run, "TrainResult", [f"{first}/checkpoint-30"]),  # at its end
        (TransformerLM, "freeze_first_phase", [f"{first}/checkpoint-30"]),  # between the phases
        (exact.ExactTrainer, "_save_rng_state", [f"{first}/checkpoint-30", "checkpoint-1.incomplete"]),  # in the second
        (exact, "remove_except", [f"{first}/checkpoint-30", "checkpoint-1"]),
        (run, "write_result", [f"{first}/checkpoint-30", "checkpoint-30", "model"]),  # before result.json is written
        (run, "remove_except", [f"{first}/checkpoint-30", "checkpoint-30", "model"]),  # and just after
    ]
    for where, name, left in moments:
        process = start(two_phase_flags, folder, lambda where=where, name=name: setattr(where, name, die))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert [path for path in left if not (folder / path).is_dir()] == []
    process = start(two_phase_flags, folder)
    process.join(120)
    assert outcome(folder) == outcome(two_phases_uninterrupted)
    assert sorted(os.listdir(folder)) == ["config.yaml", "metrics.jsonl", "model", "reconstruction", "result.json"]
    assert os.listdir(folder / first) == ["metrics.jsonl"]


def test_a_new_process_computes_the_same(flags, uninterrupted, tmp_path):
    """The forked processes above share memory with this one; a real second start shares nothing."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "newllm.cli", "train", *flags, "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob("checkpoint-*[0-9]")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert outcome(folder) == outcome(uninterrupted)
