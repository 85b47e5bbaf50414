"""Locks on folders, which survive `kill -9`: that of a process that is no more holds nobody up."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from newllm.errors import UserError
from newllm.training.checkpoints import explaining_full_disk

SUFFIX = ".newllm-lock"
CLOCK_TOLERANCE = 5.0  # seconds; the start time of a process moves when the system's clock is set
EMPTY_SECONDS = 10.0  # that a lock may be empty while it is made: a process of a busy machine stands still for a while


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a folder. The lock of a process that is no more is taken over.

    The process that has it may enter again. The file NAME.newllm-lock stands beside the folder, since the folder itself
    may be renamed. Raises UserError where another process has it, or where that file is none of ours.
    """
    path = folder.parent / f"{folder.name}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not take_lock(path, folder):
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def take_lock(path: Path, folder: Path) -> bool:
    """Makes the lock file; False where this process has it already. Raises UserError where another one has it."""
    while not create_lock(path):
        holder = lock_holder(path)
        if holder is not None and is_running(**holder):
            if holder["pid"] == os.getpid():
                return False
            raise UserError(
                f"another newllm (process {holder['pid']}) works in {folder}: wait for it, or give another --out"
            )
        remove_abandoned(path, holder)
    return True


def remove_abandoned(path: Path, holder: dict[str, Any] | None) -> None:
    """Removes a lock of this holder, who is no more: not the one that another process may have made in its place.

    Several processes may find it at once: while this one judged it, another may have removed it and made its own. So
    the lock is taken aside, which only one of them can do, and looked at there once more.
    """
    aside = path.with_name(f"abandoned-{os.getpid()}{SUFFIX}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if lock_holder(aside) == holder:
        aside.unlink()
    else:
        aside.rename(path)


def create_lock(path: Path) -> bool:
    """Makes the lock file in the name of this process; False where there is one already. Of several, one succeeds."""
    me = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    try:
        with explaining_full_disk(path.parent), path.open("x") as file:
            file.write(json.dumps(me))
    except FileExistsError:
        return False
    except OSError as error:
        why = "the name is too long" if error.errno == errno.ENAMETOOLONG else (error.strerror or str(error)).lower()
        raise UserError(f"cannot write {path}, which keeps a second process out of that folder: {why}") from error
    return True


def lock_holder(path: Path) -> dict[str, Any] | None:
    """Process id and start time of the process that made a lock file; None where nobody holds it.

    Raises UserError for a file that no newllm has made: it is not ours to remove.
    """
    while True:
        try:
            content, age = path.read_text(), time.time() - path.stat().st_mtime
            if content:
                holder = json.loads(content)
                return {"pid": int(holder["pid"]), "started": float(holder["started"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path} is no lock of newllm, whose name it has: move it away") from None
        if abs(age) > EMPTY_SECONDS:  # its process was killed right there
            return None
        time.sleep(0.1)


def is_running(pid: int, started: float) -> bool:
    """A process id is used again some day; together with the time of its start it is unique.

    A zombie has ended; where nobody collects the children of a killed process, it stays.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) <= CLOCK_TOLERANCE
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # or no number of a process
        return False
