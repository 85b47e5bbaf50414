"""Where Lagged Cache Training keeps the states of all windows, such that an interrupted run ends as any other.

In memory, they are part of every checkpoint. A file that is mapped into memory may be far larger than what one would
write so often: there, a checkpoint holds a log of what was overwritten since it was made, and going back to it means
putting that back.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "lagged_states.bf16"  # in the folder of the run
STATES = "lagged_states.safetensors"  # in a checkpoint
UNDO_LOG = "lagged_undo.bin"  # in a checkpoint: rows as they were when it was made
DTYPE = torch.bfloat16


class LaggedCache:
    """States (num_samples, T, N) in bf16, by sample; in memory."""

    def __init__(self, num_samples: int, T: int, N: int) -> None:
        self.rows = self._allocate((num_samples, T, N))
        self.known = torch.zeros(num_samples, dtype=torch.bool)
        self.checkpoint: Path | None = None  # the newest: no other is ever gone back to

    def _allocate(self, shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(shape, dtype=DTYPE)

    def knows(self, samples: Tensor) -> Tensor:
        """Which of the samples (B,) have been written: (B,) bool. Negative ones are no samples."""
        return self.known[samples.clamp(min=0)] & (samples >= 0)

    def read(self, samples: Tensor) -> Tensor:
        """(B, T, N), of samples (B,) that are known."""
        return self.rows[samples]

    def write(self, samples: Tensor, states: Tensor) -> None:
        """Keeps states (B, T, N) of samples (B,), but of negative ones; of a sample that is there twice, the last."""
        for sample, row in zip(samples.tolist(), states.to("cpu", DTYPE), strict=True):
            if sample >= 0:
                self._overwrite(sample, row)

    def _overwrite(self, sample: int, row: Tensor) -> None:
        self.rows[sample] = row
        self.known[sample] = True

    def save(self, staging: Path) -> None:
        """Writes into the folder of a checkpoint that is being made; `saved` tells that it is complete."""
        save_file(self._contents(), staging / STATES)

    def _contents(self) -> dict[str, Tensor]:
        return {"known": self.known, "rows": self.rows}

    def saved(self, checkpoint: Path) -> None:
        """From now on `restore` is called with this checkpoint, if at all. What the one before holds is removed."""
        if self.checkpoint is not None:
            for name in (STATES, UNDO_LOG):
                (self.checkpoint / name).unlink(missing_ok=True)
        self.checkpoint = checkpoint

    def restore(self, checkpoint: Path) -> None:
        """Everything as it was when the checkpoint was made, in this process or another one."""
        contents = load_file(checkpoint / STATES)
        self.known = contents["known"]
        if "rows" in contents:
            self.rows = contents["rows"]
        self.checkpoint = checkpoint


class MappedLaggedCache(LaggedCache):
    """The same in a file.

    Before a row that the newest checkpoint knows is overwritten for the first time, it is appended to that checkpoint's
    log: its sample as int64, then its numbers. A row that is half written there has not been overwritten.
    """

    def __init__(self, num_samples: int, T: int, N: int, file: Path) -> None:
        self.file = file
        super().__init__(num_samples, T, N)
        self.to_log = torch.zeros_like(self.known)
        self.log: BinaryIO | None = None

    def _allocate(self, shape: tuple[int, int, int]) -> Tensor:
        size = shape[0] * shape[1] * shape[2]
        with self.file.open("ab") as file:
            if hasattr(os, "posix_fallocate"):  # else a disk that is full later ends the process without a word
                os.posix_fallocate(file.fileno(), 0, size * DTYPE.itemsize)
            else:
                file.truncate(size * DTYPE.itemsize)
        return torch.from_file(str(self.file), shared=True, size=size, dtype=DTYPE).view(shape)

    def _overwrite(self, sample: int, row: Tensor) -> None:
        if self.to_log[sample]:
            assert self.checkpoint is not None
            if self.log is None:
                self.log = (self.checkpoint / UNDO_LOG).open("wb")
            self.log.write(np.int64(sample).tobytes() + _numbers(self.rows[sample]).tobytes())
            self.log.flush()  # to the system, which keeps it when this process is killed
            self.to_log[sample] = False
        super()._overwrite(sample, row)

    def _contents(self) -> dict[str, Tensor]:
        return {"known": self.known}

    def saved(self, checkpoint: Path) -> None:
        if self.log is not None:
            self.log.close()
        super().saved(checkpoint)
        self._begin_log()

    def restore(self, checkpoint: Path) -> None:
        super().restore(checkpoint)
        log = checkpoint / UNDO_LOG
        if log.exists():
            row = self.rows[0].numel()
            entries = np.fromfile(log, dtype=[("sample", np.int64), ("row", np.int16, row)])  # only whole ones
            for sample, numbers in entries:
                _numbers(self.rows[sample])[:] = numbers
            log.unlink()  # killed before this line, the same is put back once more
        self._begin_log()

    def _begin_log(self) -> None:
        self.log = None
        self.to_log = self.known.clone()


def _numbers(row: Tensor) -> np.ndarray:
    """A view of a row's bits: numpy knows no bf16."""
    return row.view(torch.int16).numpy().reshape(-1)


def lagged_cache(num_samples: int, T: int, N: int, folder: Path, memory_gigabytes: float) -> LaggedCache:
    """In memory up to so many gigabytes, else in a file of that folder."""
    if num_samples * T * N * DTYPE.itemsize <= memory_gigabytes * 1e9:
        return LaggedCache(num_samples, T, N)
    return MappedLaggedCache(num_samples, T, N, folder / FILE)


def remove_states(folder: Path) -> None:
    """Removes the file of a run that has ended."""
    (folder / FILE).unlink(missing_ok=True)
