"""`newllm vintix collect|train|evaluate` and `newllm bench vintix`: what they print, and where their files go."""

from __future__ import annotations

import _thread
import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.errors import UserError
from newllm.paths import user_path
from newllm.vintix.settings import CollectSettings, VintixBench, VintixRun, VintixSettings

if TYPE_CHECKING:
    from newllm.vintix.train import VintixTrainResult
    from newllm.vintix.trainer import VintixProgress

CONTROL = "-demonstrator_only"  # the folder of a control's histories has the other's name and this


def default_folder(names: list[str]) -> Path:
    """runs/vintix-NAME, where the three commands meet."""
    return Path("runs") / f"vintix-{'-'.join(names)}"


def collect(settings: VintixSettings, out: str | None) -> Path:
    """Collects into OUT, or into histories/ of the default folder."""
    from newllm.vintix.collect import collect as run

    folder = user_path(out) if out is not None else default_folder([settings.environment]) / "histories"
    run(settings, folder)
    print(f"histories: {folder}")
    return folder


def train(settings: VintixSettings, data: list[str], out: str | None) -> Path:
    """Trains a model for each seed and control seed, some at the same time, each in a folder of its own inside OUT."""
    from newllm.devices import resolve_device
    from newllm.training.checkpoints import make_folder
    from newllm.vintix.data import check_context, read_metadata

    settings.check_model()
    settings.check_train()
    device = resolve_device(settings.device)
    folders = [user_path(name) for name in data]
    told = [read_metadata(folder) for folder in folders]
    for metadata in told:  # before histories of the control are collected, which takes minutes
        check_context(settings.context, metadata["name"], min(entry["steps"] for entry in metadata["histories"]))
    names = [metadata["name"] for metadata in told]
    if len(set(names)) < len(names):
        raise UserError(f"the same family of tasks twice: {' '.join(names)}")
    folder = user_path(out) if out is not None else default_folder(names)
    make_folder(folder)
    runs = [_run(settings, seed, False) for seed in settings.seeds]
    runs += [_run(settings, seed, True) for seed in settings.control_seeds]
    controls = [_control_histories(path) for path in folders] if settings.control_seeds else []
    print("in-context score: of later episodes in validation tasks; 0 is random play, 1 the demonstrator", flush=True)
    jobs = settings.jobs or (min(len(runs), os.cpu_count() or 1) if device.type == "cpu" else 1)
    work = [(run, controls if run.demonstrator_only else folders, folder / run.name) for run in runs]
    if jobs == 1:
        for arguments in work:
            _say_result(arguments[0], _train(*arguments))
    else:
        _train_together(work, jobs)
    print(f"runs: {folder}")
    return folder


def _run(settings: VintixSettings, seed: int, demonstrator_only: bool) -> VintixRun:
    return VintixRun(**dataclasses.asdict(settings), seed=seed, demonstrator_only=demonstrator_only)


def _control_histories(folder: Path) -> Path:
    """The folder's histories without noise, collected beside it when they are not there yet."""
    from newllm.vintix.collect import collect as run
    from newllm.vintix.data import read_metadata

    values = read_metadata(folder)["collect"]
    folder = Path(os.path.abspath(folder))  # "." has no name of its own
    control = folder.with_name(folder.name + CONTROL)
    run(CollectSettings(**values | {"noise_free_share": 1.0}), control)
    return control


def _train(run: VintixRun, data: list[Path], folder: Path) -> VintixTrainResult:
    from newllm.vintix.train import train

    return train(run, data, folder, say_progress)


_interrupted: Any = None  # in a process that trains: an event, set when the user has interrupted the command
LISTENING = 0.2  # seconds between two looks of such a process at the one that started it


def _begin_process(interrupted: Any) -> None:
    """A process that trains hears of Ctrl-C from the one that started it, once, and so has the time to save.

    What the terminal sends is blocked: it comes at any time, again and again, and not at all where the command alone
    was interrupted, as by `kill -INT`. While there is nothing to train, an interruption is of no matter.
    """
    global _interrupted
    _interrupted = interrupted
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_listen, daemon=True).start()


def _listen() -> None:
    """Hands an interruption on to the main thread; ends this process with the one that started it, however that ended.

    Otherwise it would train on after `kill -9`, and keep the command from continuing.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    handed_on = False
    while parent.is_alive():
        if not handed_on and _interrupted.is_set():
            _thread.interrupt_main()
            handed_on = True
        time.sleep(LISTENING)
    os._exit(1)


def _train_in_process(run: VintixRun, data: list[Path], folder: Path) -> VintixTrainResult:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _interrupted.is_set():  # the pool hands out one run too many before it can be told to stop
            raise KeyboardInterrupt
        return _train(run, data, folder)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train_together(work: list[tuple[VintixRun, list[Path], Path]], jobs: int) -> None:
    """Each run in a process of its own, on its share of the threads: small models gain little from several.

    Where one fails, the others save their state and end as well: it is said at once, and the same command continues.
    """
    context = multiprocessing.get_context("spawn")
    interrupted = context.Event()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_process, initargs=(interrupted,))
    try:
        started: dict[Future, VintixRun] = {}
        for run, data, folder in work:
            own = run if run.threads is not None else dataclasses.replace(run, threads=threads)
            started[pool.submit(_train_in_process, own, data, folder)] = run
        for future in as_completed(started):
            _say_result(started[future], future.result())
    except BrokenProcessPool:
        raise UserError(
            "a process that trained has died, perhaps for want of memory: the same command continues from the last "
            "checkpoints, with --jobs 1 one model at a time"
        ) from None
    except BaseException:
        interrupted.set()
        raise
    finally:
        # A run under way saves its state, and is waited for; one that has not begun does not begin.
        pool.shutdown(wait=True, cancel_futures=True)


def say_progress(progress: VintixProgress) -> None:
    print(
        f"{progress.run}: step {progress.step:,} of {progress.total_steps:,}, loss {progress.loss:.4f}, "
        f"in-context score {progress.score:.2f}, {progress.seconds_left / 60:.1f} min left",
        flush=True,
    )


def _say_result(run: VintixRun, result: VintixTrainResult) -> None:
    print(
        f"{run.name}: {result.parameters:,} parameters, {result.steps:,} steps in {result.seconds / 60:.1f} min; best "
        f"in-context score {result.best_score:.2f} at step {result.best_step:,}",
        flush=True,
    )


def evaluate(settings: VintixSettings, folders: list[str], out: str | None) -> Path:
    """Plays test tasks with all runs of the folders; evaluation.json and report.html go to OUT or the first folder."""
    from newllm.training.checkpoints import make_folder
    from newllm.vintix.evaluate import evaluate as run
    from newllm.vintix.report import write_report

    folder = user_path(out) if out is not None else user_path(folders[0])
    if out is not None:
        make_folder(folder)
    command = shlex.join(["newllm", *sys.argv[1:]])
    results = json.loads(run([user_path(name) for name in folders], settings, folder, command).read_text())
    report = write_report(folder)
    for family in results["families"]:
        print_scores(family, settings.headline_episode)
    print(f"report: {report}")
    return report


def print_scores(family: dict[str, Any], headline: int) -> None:
    """A row for each way to play, as the report names it: normalised scores, with their 95 % intervals."""
    from newllm.vintix.report import CURVES

    episodes = sorted({1, headline, len(family["curves"]["full"]["value"])})
    what = "score, 0 random play, 1 the demonstrator [95 % interval, over seeds too where several]"
    print(f"\n{family['name']}: {family['tasks']} test tasks, {what}")
    print(f"  {'':18}" + "".join(f"{f'episode {episode}':>22}" for episode in episodes))
    for name, values in family["curves"].items():
        at = [tuple(values[key][episode - 1] for key in ("value", "low", "high")) for episode in episodes]
        seeds = f"  {'seeds' if len(values['seeds']) > 1 else 'seed'} {', '.join(map(str, values['seeds']))}"
        cells = "".join(f"{f'{v:.2f} [{low:.2f}, {high:.2f}]':>22}" for v, low, high in at)
        print(f"  {CURVES[name][0]:18}{cells}{seeds if values['seeds'] else ''}")
    for name in family["curves"]:
        print(f"  {CURVES[name][0]}: {CURVES[name][1]}")


def bench(settings: VintixBench) -> dict[str, Any]:
    """Measures and prints a table, then one JSON line."""
    from rich.console import Console

    from newllm.vintix.bench import bench_vintix

    with Console(stderr=True).status("starting") as status:
        result = bench_vintix(settings, status.update)
    machine = result["machine"]
    print(f"vintix, {settings.environments} environments at once: {machine['cpu']}, {machine['threads']} threads")
    print(f"  {'steps read':>12}{'ring, ms':>12}{'again, ms':>12}{'speed (range)':>22}")
    for row in result["rows"]:
        ratio = row["speed_ratio"]
        text = f"{ratio['ratio']:.1f} ({ratio['range'][0]:.1f}–{ratio['range'][1]:.1f})"
        print(f"  {row['steps_read']:>12,}{row['ring_ms']:>12.2f}{row['recomputed_ms']:>12.1f}{text:>22}")
    print(f"  ring: {result['cache_bytes'] / 1e6:,.1f} MB")
    print(json.dumps(result))
    return result
