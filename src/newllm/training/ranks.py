"""One run in several processes, as torchrun starts them: what the first does for all, and what all must agree on.

Every process trains on batches of its own; files are the first one's. Where one of them ends with an error, torchrun
ends the others. In a single process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed

from newllm.errors import UserError
from newllm.training.locks import lock

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together. Raises UserError where the environment does not say a number."""
    return _told("WORLD_SIZE", least=1) if os.environ.get("WORLD_SIZE") else 1


def is_first() -> bool:
    """Whether this process writes the files; in a run of one process it does."""
    return world_size() == 1 or _told("RANK") == 0


def _told(name: str, least: int = 0) -> int:
    """What torchrun tells a process by this variable of its environment."""
    text = os.environ.get(name, "")
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise UserError(
        f"{name} is '{text}' in the environment: torchrun makes it a whole number from {least}; "
        "start with torchrun, or unset WORLD_SIZE to train in one process"
    )


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Connects the processes of a run, over gloo on CPUs and NCCL on GPUs, one of which each process gets.

    Within a block of its own kind it does nothing. Raises UserError where the environment does not say who is who.
    """
    if world_size() == 1 or distributed.is_initialized():
        yield
        return
    from accelerate import PartialState

    if _told("RANK") >= world_size():
        raise UserError(f"RANK is {os.environ['RANK']} in the environment, WORLD_SIZE {world_size()}: it must be less")
    _told("LOCAL_RANK")
    _told("MASTER_PORT", least=1)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is not in the environment: start with torchrun, or unset WORLD_SIZE")
    # The others wait while the first reads its data or validates, however long that takes.
    PartialState(cpu=device.type == "cpu", timeout=datetime.timedelta(days=7))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """Returns when all processes have come to this point."""
    if world_size() > 1:
        distributed.barrier()


def locked_by_first(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on the run folder, which the first process has for all."""
    return lock(folder) if is_first() else contextlib.nullcontext()


@contextlib.contextmanager
def first_alone() -> Iterator[bool]:
    """The first process goes through the block while the others wait, then they; yields whether it is the first.

    For what makes files that the others then find.
    """
    if not is_first():
        wait()
    yield is_first()
    if is_first():
        wait()


def of_first(value: T) -> T:
    """The first process's value, in all of them."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
