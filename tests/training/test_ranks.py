"""Training in two processes, as torchrun starts them, on this CPU: the same run as one process with twice the batch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SHAPE, STEP, WINDOWS, metrics

from newllm.cli import main
from newllm.models import TransformerLM
from newllm.models.layers import LAYER_TYPES, create_layer
from newllm.training.ranks import is_first, world_size

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(text, processes=1, **changes):
    """`newllm train` in so many processes."""
    values = {"precision": "float32", "threads": 1, "lr": 0.003, "evaluations": 2, "max_tokens": 20 * 2 * STEP}
    values |= SHAPE | WINDOWS | {"data": text / "play.txt", "cache_dir": text / "cache"} | changes
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [*(TORCHRUN if processes > 1 else [sys.executable]), "-m", "newllm.cli", "train", *flags]


def newllm(text, **arguments):
    """What it printed, and its exit code."""
    done = subprocess.run(command(text, **arguments), capture_output=True, text=True, env=ENVIRONMENT)
    return done.stdout + done.stderr, done.returncode


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """Folders of one run in one process, and in two."""
    folder = tmp_path_factory.mktemp("ranks")
    alone, together = folder / "alone", folder / "together"
    printed, code = newllm(text, batch_size=8, out=alone)
    assert code == 0, printed
    printed, code = newllm(text, processes=2, batch_size=4, out=together)
    assert code == 0, printed
    assert printed.count("trained on") == 1, "the first process speaks for all"
    assert "find_unused_parameters" not in printed
    return alone, together


def test_two_processes_train_as_one_with_twice_the_batch(runs):
    alone, together = map(metrics, runs)
    assert [line.keys() for line in alone] == [line.keys() for line in together]
    for ours, theirs in zip(alone, together, strict=True):
        for key in ours.keys() & {"train_loss", "val_loss", "grad_norm"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key
        assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
    weights = [load_file(folder / "model" / "model.safetensors") for folder in runs]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4)


def test_files_are_those_of_one_process(runs):
    alone, together = runs
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert not list(together.parent.glob("*.newllm-lock"))
    assert json.loads((together / "result.json").read_text())["processes"] == 2
    assert "processes" not in json.loads((alone / "result.json").read_text())


def test_a_finished_run_is_not_trained_again_and_one_process_does_not_continue_it(text, runs, tmp_path):
    together = Path(shutil.copytree(runs[1], tmp_path / "together"))
    before = (together / "model" / "model.safetensors").stat().st_mtime_ns
    printed, code = newllm(text, processes=2, batch_size=4, out=together)
    assert code == 0, printed
    assert (together / "model" / "model.safetensors").stat().st_mtime_ns == before
    printed, code = newllm(text, batch_size=4, out=together)
    assert "kept as together~old" in " ".join(printed.split())
    assert code == 0
    assert "processes" not in json.loads((together / "result.json").read_text())


def test_killed_and_started_again_it_ends_bit_for_bit_as_it_would_have(text, runs, tmp_path):
    whole, folder = runs[1], tmp_path / "run"
    arguments = {"batch_size": 4, "out": folder, "checkpoint_minutes": 0}
    running = subprocess.Popen(command(text, processes=2, **arguments), env=ENVIRONMENT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoint-[3-9]")):
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert not (folder / "model").exists()
    printed, code = newllm(text, processes=2, **arguments)
    assert code == 0, printed
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, folder)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_a_rank_that_something_else_has_left_in_the_environment_is_none(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert is_first()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name, cls in LAYER_TYPES.items()
        if cls.__module__.startswith("newllm.models")
        for options in ({}, *cls.variants)
    ],
)
def test_every_parameter_of_our_layers_has_a_gradient_in_every_step(name, options):
    """As the processes are told, which then need not look for idle ones."""
    if "segment_length" in LAYER_TYPES[name].option_names():
        options = {"segment_length": 4} | options
    shape = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 80}
    model = TransformerLM(layers=[create_layer({"type": name} | shape | options) for _ in range(2)], vocab_size=61)
    ids, phases = torch.randint(61, (2, 16)), [model.train()]
    if (first := model.reconstruction()) is not None:
        phases = [first, model]
        first.freeze_the_rest()
    for phase in phases:
        phase(ids, labels=ids)["loss"].backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        model.zero_grad()
        model.freeze_first_phase()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["compare", "--models", "pythia"],
            "compare works in one process, WORLD_SIZE is 2: torchrun is for",
        ),
        (
            ["train", "--model", "dproj", "--step-by-step", "true"],
            "dproj: its projection is trained first, in one",
        ),
        (["train", "--model", "continuous"], "continuous feeds a state back: Lagged Cache Training works in one"),
        (["train", "--model", "infini", "--streaming", "true"], "--streaming works in one process"),
    ],
)
def test_what_needs_one_process_is_told_before_anything_starts(arguments, words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment: torchrun makes it a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "first"}, "RANK is 'first' in the environment: torchrun makes it a whole number from 0"),
        ({"RANK": None}, "RANK is ''"),
        ({"RANK": "2"}, "RANK is 2 in the environment, WORLD_SIZE 2: it must be less"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is ''"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT is '-1'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not in the environment: start with torchrun, or unset WORLD_SIZE"),
    ],
)
def test_an_environment_that_no_launcher_has_made_is_told_in_one_line(changes, words, monkeypatch, capsys, tmp_path):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (launched | changes).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_empty_number_of_processes_is_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert world_size() == 1
