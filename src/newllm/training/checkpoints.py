"""Checkpoints that survive `kill -9`, and the files of a run folder.

A folder counts only under its final name: everything is written to `….incomplete` and then renamed, which the file
system does at once or not at all. Whatever still carries that suffix when a run starts is the rest of a killed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from safetensors import SafetensorError

from newllm.errors import UserError
from newllm.resolution import fits
from newllm.settings import RunSettings, to_yaml

INCOMPLETE = ".incomplete"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LONGEST_NAME = 200  # bytes of a folder's name: systems take 255, and locks and ~old are appended
SIZES = "sizes.json"  # in a checkpoint
ERROR_FILE = "error.txt"  # what went wrong in a run of a comparison


@contextlib.contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Turns the error of a write that found no space into one line for the user."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer reports a full disk in its own way
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        # torch.save hides the cause, so the free space decides where the message does not.
        if "No space left" in str(error) or shutil.disk_usage(existing).free < 2**20:
            raise UserError(
                f"no space left on the disk of {folder}: free some and run the same command again; "
                "what was complete is kept"
            ) from error
        raise


def incomplete(folder: Path) -> Path:
    """Where a folder is while it is being written."""
    return folder.with_name(folder.name + INCOMPLETE)


@contextlib.contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A staging folder to write into; it becomes `folder` when the block ends without an error."""
    staging = incomplete(folder)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with explaining_full_disk(folder.parent):
            staging.mkdir(parents=True)
            yield staging
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


@contextlib.contextmanager
def complete_checkpoint(folder: Path) -> Iterator[Path]:
    """`complete_folder` for a checkpoint, which also says how large each of its files is."""
    with complete_folder(folder) as staging:
        yield staging
        sizes = {file.name: file.stat().st_size for file in staging.iterdir()}
        (staging / SIZES).write_text(json.dumps(sizes))


def damaged_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that are not there, or not as large as they were written."""
    path = folder / SIZES
    try:
        files = {folder / name: size for name, size in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return [path]
    return [file for file, size in files.items() if not file.is_file() or file.stat().st_size != size]


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint whose files are whole, as after a failing disk not all are; what is passed over is said.

    Raises UserError where there are checkpoints and none is whole: training anew is for the user to decide.
    """
    damaged: list[Path] = []
    for checkpoint in reversed(checkpoints(run_folder)):
        if not (files := damaged_files(checkpoint)):
            for file in damaged:
                print(f"newllm: note: {file} is damaged: going on from {checkpoint.name}", file=sys.stderr)
            return checkpoint
        damaged.append(files[0])
    if damaged:
        raise UserError(
            f"{damaged[0]} is damaged, and no older checkpoint is whole: remove {damaged[0].parent} to train anew"
        )
    return None


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"checkpoint-{step}"


def checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    steps = [int(match[1]) for path in run_folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
    return [checkpoint_folder(run_folder, step) for step in sorted(steps)]


def remove_incomplete(run_folder: Path) -> None:
    """Removes what a killed run had begun to write or to remove."""
    for path in run_folder.glob("*" + INCOMPLETE):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_except(run_folder: Path, keep: set[int]) -> None:
    """Removes every checkpoint but those of the given steps.

    A half-removed folder must not look complete, so it is renamed before its files go.
    """
    for path in checkpoints(run_folder):
        if path not in {checkpoint_folder(run_folder, step) for step in keep}:
            shutil.rmtree(path.rename(path.with_name(path.name + INCOMPLETE)))


def read_result(run_folder: Path) -> dict[str, Any]:
    """The run's result.json, or {} before the run has begun."""
    path = run_folder / "result.json"
    return read_object(path, _anew(run_folder)) if path.is_file() else {}


T = TypeVar("T")


def training_result(kind: type[T], run_folder: Path, result: dict[str, Any], phase: str = "training") -> T:
    """What a run says about its training, or a phase before it. Raises UserError where somebody has edited it."""
    values, fields = result[phase], get_type_hints(kind)
    if (
        not isinstance(values, dict)
        or values.keys() != fields.keys()
        or not all(fits(values[name], hint) for name, hint in fields.items())
    ):
        raise UserError(f"{run_folder / 'result.json'} is damaged under '{phase}': {_anew(run_folder)}")
    return kind(**values)


def _anew(run_folder: Path) -> str:
    return f"move {run_folder} away, and the same command trains anew"


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """A JSON file that we wrote. Raises UserError, with what to do, where it is cut off or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged or no file of newllm: {advice}")
    return value


def write_result(run_folder: Path, result: dict[str, Any]) -> None:
    write_whole(run_folder / "result.json", json.dumps(result, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file so that a reader, or a kill, sees the old or the new one and never a part."""
    staging = path.with_name(path.name + INCOMPLETE)
    with explaining_full_disk(path.parent):
        try:
            staging.write_text(text, encoding="utf-8")
            staging.replace(path)
        except OSError:
            staging.unlink(missing_ok=True)
            raise


def make_folder(folder: Path) -> None:
    """Makes a result folder before any work is done. Raises UserError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot make this folder: {(error.strerror or str(error)).lower()}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {folder}: no permission to write there")


def refuse_other_files(run_folder: Path) -> None:
    """Raises UserError for a file, or for files in a folder, that no run has left: somebody's, and not touched."""
    if run_folder.exists() and not run_folder.is_dir():
        raise UserError(f"{run_folder} is a file, where the folder of a run should be: move it away")
    if not run_folder.is_dir() or "hash" in read_result(run_folder):
        return
    ours = {ERROR_FILE, "result.json" + INCOMPLETE}  # left by a run that failed, or was killed, before it began
    if any(path.name not in ours for path in run_folder.iterdir()):
        raise UserError(f"--out {run_folder} holds other files: choose an empty or new folder")


def set_aside(*paths: Path) -> list[Path]:
    """Renames what belongs together to NAME~old (NAME~old.html of a file), or ~old2, … where one of these is there."""

    def renamed(path: Path, mark: str) -> Path:
        return path.with_name(f"{path.stem}{mark}{path.suffix}" if path.is_file() else path.name + mark)

    marks = itertools.chain(["~old"], (f"~old{count}" for count in itertools.count(2)))
    free = next(mark for mark in marks if not any(renamed(path, mark).exists() for path in paths))
    return [path.rename(renamed(path, free)) for path in paths]


def file_name(text: str) -> str:
    """The text with what a file name cannot hold on some system replaced; a long one is cut, and its hash appended."""
    name = re.sub(r"[^\w.,=-]+", "_", text)
    if len(name.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
    return name


def claim_run_folder(
    run_folder: Path,
    settings: RunSettings,
    data_fingerprint: str,
    say: Callable[[str], None] = print,
    processes: int = 1,
) -> dict[str, Any]:
    """Makes the folder that of this run, and returns its result.json so far.

    The same settings on the same data, in as many processes, continue where they were. Another run's folder may hold
    hours of training: it is kept as `NAME~old`, `NAME~old2`, …, which is said. Raises UserError for a folder with files
    that no run has left.
    """
    refuse_other_files(run_folder)
    identity: dict[str, Any] = {"model": settings.model, "seed": settings.seed, "data": data_fingerprint}
    identity["hash"] = settings.hash(training_only=True)
    result = read_result(run_folder)
    if processes > 1:
        identity["processes"] = processes  # their batches make a step
    if any(result.get(key) != value for key, value in identity.items()) or result.get("processes", 1) != processes:
        if result:
            (old,) = set_aside(run_folder)
            say(f"{run_folder} holds a run with other settings or data: kept as {old.name}")
        run_folder.mkdir(parents=True, exist_ok=True)
        result = identity
        write_result(run_folder, result)
    write_whole(run_folder / "config.yaml", to_yaml(settings))
    remove_incomplete(run_folder)
    return result
