"""Batches for training and evaluation: independent windows, or streams that carry state from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from newllm.data.tokens import TokenFile

IGNORED = -100
"""Label of positions without loss (PyTorch's and Hugging Face's convention)."""


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


class StreamDataset(Dataset[dict[str, Tensor]]):
    """Batches whose row r goes on where row r of the batch before ended, for models that carry a state.

    Every token appears exactly once. A chunk never crosses a document: a document's last chunk is padded on the right,
    and the next chunk of its row begins a new document (`starts`), where the state must be reset. Documents are dealt
    to the rows longest first, each to the row with the fewest batches so far, so that rows end about together; a row
    without further documents is all padding. In its row a document keeps its place in the corpus, or a random one by
    `seed`.

    Item i is the whole batch i (use `DataLoader(..., batch_size=None, shuffle=False)`, or iterate directly):
        input_ids (B, T) int64, attention_mask (B, T) bool, labels (B, T) with -100 where padded, starts (B,) bool.
    Since labels are shifted inside a chunk, the first token of each chunk is input but not predicted.
    """

    def __init__(self, tokens: TokenFile, seq_length: int, batch_size: int, seed: int | None = None):
        self.ids, self.seq_length = tokens.ids, seq_length
        starts = tokens.document_starts
        chunks = -(-np.diff(starts) // seq_length)
        rows: list[list[int]] = [[] for _ in range(batch_size)]
        filled = np.zeros(batch_size, dtype=np.int64)
        for document in np.argsort(-chunks, kind="stable"):
            row = int(filled.argmin())
            rows[row].append(int(document))
            filled[row] += chunks[document]
        place = np.arange(len(chunks)) if seed is None else np.random.default_rng(seed).permutation(len(chunks))
        # One (begin, end, new document) for each chunk of each row; begin = end where the row has ended.
        self.table = np.zeros((batch_size, int(filled.max()), 3), dtype=np.int64)
        for row, documents in enumerate(rows):
            index = 0
            for document in sorted(documents, key=lambda document: place[document]):
                begin = np.arange(starts[document], starts[document + 1], seq_length)
                target = self.table[row, index : index + len(begin)]
                target[:, 0] = begin
                target[:, 1] = np.minimum(begin + seq_length, starts[document + 1])
                target[0, 2] = 1
                index += len(begin)

    def __len__(self) -> int:
        return self.table.shape[1]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chunks = self.table[:, index]
        ids = np.zeros((len(chunks), self.seq_length), dtype=np.int64)
        for row, (begin, end, _) in enumerate(chunks):
            ids[row, : end - begin] = self.ids[begin:end]
        input_ids = torch.from_numpy(ids)
        lengths = torch.from_numpy(chunks[:, 1] - chunks[:, 0])
        mask = torch.arange(self.seq_length) < lengths[:, None]  # (B, T)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": input_ids.masked_fill(~mask, IGNORED),
            "starts": torch.from_numpy(chunks[:, 2].astype(bool)),
        }
