"""The commands of Vintix: from histories to the report, configs by name, and one line for what is wrong."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest
import vintix_waiting
import yaml
from vintix_stub import SMALL, write_dataset

from newllm.cli import main
from newllm.commands import vintix as commands
from newllm.commands.flags import config_names
from newllm.training.locks import is_running
from newllm.vintix.settings import CONFIGS_FOLDER, VintixSettings

FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_from_nothing_to_the_report(tmp_path, monkeypatch, capsys):
    """In the folders where the commands meet by default, the control's histories included; ~ is the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    few = ["--train-tasks", "4", "--validation-tasks", "2", "--test-tasks", "3", "--history-steps", "48"]
    assert main(["vintix", "collect", *few, "--score-episodes", "4"]) == 0
    histories = "runs/vintix-point_reacher/histories"
    flags = [*FLAGS, "--target", "demonstrator", "--jobs", "1"]
    assert main(["vintix", "train", f"~/{histories}", *flags, "--seeds", "4", "--control-seeds", "0"]) == 0
    control = json.loads((tmp_path / f"{histories}-demonstrator_only" / "metadata.json").read_text())
    assert control["collect"]["noise_free_share"] == 1
    flags = ["--episodes", "2", "--headline-episode", "2", "--resamples", "20"]
    assert main(["vintix", "evaluate", "~/runs/vintix-point_reacher", *flags]) == 0
    said = capsys.readouterr().out
    assert "in-context score: of later episodes in validation tasks; 0 is random play, 1 the demonstrator" in said
    for line in ("context reset: the same, its context emptied at every episode", "blind demonstrator: takes every"):
        assert f"\n  {line}" in said
    folder = tmp_path / "runs" / "vintix-point_reacher"
    assert (folder / "seed-4" / "model" / "model.safetensors").is_file()
    assert (folder / "report.html").is_file()
    curves = json.loads((folder / "evaluation.json").read_text())["families"][0]["curves"]
    assert (curves["full"]["seeds"], curves["demonstrator_only"]["seeds"]) == ([4], [0])


def test_a_process_that_dies_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    class Pool:
        def __init__(self, *given, **named):
            pass

        def submit(self, *given):
            died = Future()
            died.set_exception(BrokenProcessPool("a child has died"))
            return died

        def shutdown(self, **named):
            pass

    monkeypatch.setattr(commands, "ProcessPoolExecutor", Pool)
    data = write_dataset(tmp_path / "histories", train_tasks=2)
    argv = ["vintix", "train", str(data), *FLAGS, "--jobs", "2", "--seeds", "0", "1", "--out", str(tmp_path / "r")]
    complain(argv, "a process that trained has died, perhaps for want of memory", capsys, tmp_path, monkeypatch)


def wait_for(what):
    for _ in range(600):
        if (value := what()) is not None:
            return value
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def written(path):
    return int(path.read_text()) if path.is_file() and path.read_text() else None


def test_a_process_that_trains_hears_of_an_interruption_once_from_the_one_that_started_it(tmp_path):
    """At any time, also while it still reads its histories; what the terminal sends it itself does not count."""
    spawn = multiprocessing.get_context("spawn")
    interrupted = spawn.Event()
    with ProcessPoolExecutor(1, spawn, commands._begin_process, (interrupted,)) as pool:
        running, next_one = (pool.submit(vintix_waiting.train, tmp_path / name) for name in ("first", "second"))
        process = wait_for(lambda: written(tmp_path / "first"))
        os.kill(process, signal.SIGINT)
        time.sleep(1)
        assert not running.done()
        interrupted.set()
        assert isinstance(running.exception(60), KeyboardInterrupt)
        assert isinstance(next_one.exception(60), KeyboardInterrupt)
    assert not (tmp_path / "second").exists()


def test_a_process_that_trains_ends_with_the_one_that_started_it(tmp_path):
    path = os.pathsep.join(sys.path)
    command = [sys.executable, vintix_waiting.__file__, str(tmp_path / "pid")]
    starter = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    process = wait_for(lambda: written(tmp_path / "pid"))
    began = psutil.Process(process).create_time()
    starter.kill()
    starter.wait()
    wait_for(lambda: None if is_running(process, began) else True)


@pytest.mark.parametrize("name", config_names(CONFIGS_FOLDER))
def test_configs_hold_settings_that_fit_together(name, capsys):
    assert main(["vintix", "train", "x", "--config", name, "--print_config"]) == 0
    settings = VintixSettings(**yaml.safe_load(capsys.readouterr().out))
    given = yaml.safe_load((CONFIGS_FOLDER / f"{name}.yaml").read_text())
    assert {key: getattr(settings, key) for key in given} == {key: pytest.approx(value) for key, value in given.items()}
    for check in (settings.check_collect, settings.check_model, settings.check_train, settings.check_evaluate):
        check()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere: no such folder"),
        (["train", "x", "--hidden-size", "30"], "--hidden-size is 30"),
        (["train", "x", "--seeds", "1", "1"], "each seed only once"),
        (["train", "x", "--stepz", "1"], "--steps"),
        (["train", "x", "--config", "tinny"], "tinny"),
        (["evaluate", "x", "--headline-episode", "99"], "--headline-episode is 99"),
        (["collect", "--collect-seed", "-1"], "--collect-seed is -1: a seed is a whole number from 0"),
        (["train", "x", "--seeds", "0", "-1"], "--seeds is [0, -1]: a seed is a whole number from 0"),
        (["train", "x", "--control-seeds", "5000000000"], "--control-seeds is [5000000000]: a seed"),
        (["train", "x", "--weight-decay", "-1"], "--weight-decay is -1.0: it must be at least 0"),
        (["train", "x", "--max-grad-norm", "-1"], "--max-grad-norm is -1.0: it must be at least 0"),
        (["evaluate", "x", "--evaluate-seed", "-1"], "--evaluate-seed is -1: a seed is a whole number from 0"),
        (["evaluate", "x", "--threads", "0"], "--threads is 0: it must be at least 1"),
        (["collect", "--out", "file.txt"], "file.txt is a file: choose an empty or new folder"),
        (["train", "file.txt"], "file.txt: no folder with a metadata.json"),
        (["evaluate", "file.txt"], "file.txt: no such folder"),
        (["train", "half"], "half/metadata.json: broken: it lacks name, family"),
    ],
)
def test_what_is_wrong_takes_one_line(argv, message, capsys, tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metadata.json").write_text('{"format": 1}')
    complain(["vintix", *argv], message, capsys, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-heads", "0"], "--num-heads is 0: it must be at least 1"),
        (["--hidden-size", "30"], "--hidden-size is 30: it must be"),
        (["--threads", "0"], "--threads is 0: it must be at least 1"),
        (["--laps", "0"], "--laps is [0]: give whole numbers of at least 1"),
    ],
)
def test_what_is_wrong_with_a_benchmark_takes_one_line(argv, message, capsys, tmp_path, monkeypatch):
    complain(["bench", "vintix", *argv], message, capsys, tmp_path, monkeypatch)


def complain(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_controls_histories_stand_beside_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(write_dataset(tmp_path / "histories", train_tasks=2))
    flags = [*FLAGS, "--jobs", "1", "--seeds", "--control-seeds", "0", "--out", "../r"]
    assert main(["vintix", "train", ".", *flags]) == 0
    assert (tmp_path / "histories-demonstrator_only" / "metadata.json").is_file()
    assert (tmp_path / "r" / "demonstrator_only-0" / "model").is_dir()


def test_a_context_that_is_too_long_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    histories = write_dataset(tmp_path / "histories", train_tasks=2)
    argv = ["vintix", "train", str(histories), *FLAGS, "--context", "49", "--control-seeds", "0", "--out", "r"]
    complain(argv, "--context is 49: the histories of point_reacher have 48 steps", capsys, tmp_path, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["histories"]


def test_bench_prints_a_table_and_a_json_line(capsys):
    small = ["--hidden-size", "16", "--num-layers", "1", "--intermediate-size", "8", "--context", "16"]
    assert main(["bench", "vintix", *small, "--environments", "2", "--rounds", "1", "--steps", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["steps_read"] for row in result["rows"]] == [16, 32, 64]
    assert result["cache_bytes"] == 2 * 2 * 16 * 16 * 4
