"""Batches for training and evaluation: independent windows, those of tasks, or streams that carry state on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from newllm.data.tokens import TokenFile
from newllm.ops.loss import IGNORED

if TYPE_CHECKING:
    from newllm.data.preparation import PreparedData
    from newllm.settings import CommonSettings


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Contiguous, non-overlapping windows over a split: item i is tokens [i T, (i + 1) T), as {"input_ids", "labels"}.

    The incomplete rest is dropped. A window may cross documents, which EOS separates. Labels are the inputs, (T,)
    int64; the model shifts them.
    """

    def __init__(self, tokens: TokenFile, seq_length: int, samples: int | None = None, seed: int = 0):
        """`samples` takes that many windows at random (by `seed`), each at most once; None takes all."""
        count = len(tokens) // seq_length
        self.ids, self.seq_length = np.asarray(tokens.ids), seq_length  # a plain view: half the time for each item
        self.windows = np.arange(count)
        if samples is not None and samples < count:
            self.windows = np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.windows[index]) * self.seq_length
        ids = torch.from_numpy(self.ids[start : start + self.seq_length].astype(np.int64))  # (T,)
        return {"input_ids": ids, "labels": ids}


class TaskDataset(Dataset[dict[str, Tensor]]):
    """Training windows of a task without end: item i is made from (seed, i) alone, whatever was read before.

    Each is {"input_ids", "labels"}: one window, (T,) int64, or R windows of L tokens in its place, (R, L) with
    R·L ≤ T.
    """

    def __init__(self, data: PreparedData, settings: CommonSettings, seed: int) -> None:
        """Raises UserError where settings and data make no windows."""
        raise NotImplementedError

    def expect(self, steps: int, items_per_step: int) -> None:
        """Announces how many optimizer steps there will be on this task, and how many items each takes."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError


class StreamDataset(Dataset[dict[str, Tensor]]):
    """Text in B rows, each of which goes on in a batch where it ended in the batch before: for models that carry state.

    A pass lays the documents end to end, in an order of its own, and divides their chunks of T tokens evenly among the
    rows. A chunk never crosses a document: a document's last chunk is padded on the right. A document that stands where
    the text is divided is cut there, and its rest, at the start of a row, is read as a document of its own.

    Item i is row i mod B of batch i // B; a DataLoader with batch_size=B and no shuffling gives the batches. Items
    from len(self) on are those of further passes. Each is:
        input_ids (T,) int64; attention_mask (T,) bool, False where padded; labels (T,), −100 there;
        starts () bool, whether state must be reset; position_ids (T,), counted from the last such reset.
    Since labels are shifted inside a chunk, the first token of each chunk is input but not predicted.
    """

    def __init__(self, tokens: TokenFile, seq_length: int, batch_size: int, seed: int = 0):
        """The order of the documents in pass p is random by (seed, p)."""
        self.ids, self.seq_length, self.batch_size, self.seed = np.asarray(tokens.ids), seq_length, batch_size, seed
        self.document_starts = tokens.document_starts
        self.chunks = -(-np.diff(tokens.document_starts) // seq_length)  # of each document
        self.num_chunks = int(self.chunks.sum())
        self.batches = -(-self.num_chunks // batch_size)  # in a pass
        self._lay_out(0)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def _lay_out(self, number: int) -> None:
        """The chunks of a pass in reading order: the document of each, and its place in it."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.chunks))
        chunks = self.chunks[order]
        self.number = number
        self.document = np.repeat(order, chunks)
        self.place = np.arange(self.num_chunks) - np.repeat(np.cumsum(chunks) - chunks, chunks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch, row = divmod(index, self.batch_size)
        number, batch = divmod(batch, self.batches)
        if number != self.number:
            self._lay_out(number)
        T, read = self.seq_length, 0  # chunks of this document that the row has read before
        ids, starts = np.zeros(0, dtype=np.int64), False  # where the row has ended
        first, after = (r * self.num_chunks // self.batch_size for r in (row, row + 1))
        if first + batch < after:
            document, place = self.document[first + batch], self.place[first + batch]
            begin = self.document_starts[document] + place * T
            ids = self.ids[begin : min(begin + T, self.document_starts[document + 1])]
            read = min(int(place), batch)
            starts = read == 0
        input_ids = torch.zeros(T, dtype=torch.long)
        input_ids[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask = torch.arange(T) < len(ids)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": torch.arange(read * T, (read + 1) * T),
            "labels": input_ids.masked_fill(~mask, IGNORED),
            "starts": torch.tensor(starts),
        }
