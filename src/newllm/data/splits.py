"""From a stream of documents to three splits that share no document.

Documents are written once to a spool file on disk; a split is then a list of byte ranges in it, so that memory holds a
few numbers per document, never the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from newllm.data.corpora import Corpus, Document
from newllm.errors import UserError

SPLITS = ("train", "validation", "test")


class Extent(NamedTuple):
    """Bytes [begin, end) of the spool file."""

    title: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class Spool:
    """Texts on disk, in UTF-8, one after another."""

    def __init__(self, path: Path, documents: Iterable[Document]):
        self.path = path
        self.extents: list[Extent] = []
        self.hashes: list[int] = []
        begin = 0
        with path.open("wb") as stream:
            for title, text in documents:
                # JSON can spell lone surrogates, which no UTF-8 text can hold.
                data = text.encode("utf-8", errors="replace")
                stream.write(data)
                self.extents.append(Extent(title, begin, begin + len(data)))
                self.hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))
                begin += len(data)

    def read_bytes(self, extent: Extent) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(extent.begin)
            return stream.read(extent.size)

    def read(self, extents: list[Extent]) -> Iterator[Document]:
        for extent in extents:
            yield Document(extent.title, self.read_bytes(extent).decode("utf-8"))


def split_documents(
    spool: Spool, corpus: Corpus, validation_share: float, test_share: float
) -> tuple[dict[str, list[Extent]], str]:
    """The extents of each split, and how it was done, in words.

    Raises:
        UserError: no text at all, or shares that leave nothing to train on.
    """
    if not spool.extents:
        raise UserError(f"{corpus.name}: no text in it; every document is empty")
    if corpus.fixed_split is not None:
        chosen = [corpus.fixed_split[extent.title] for extent in spool.extents]
        return _gather(spool.extents, chosen), "by whole documents, fixed with the corpus"
    if validation_share + test_share >= 1:
        raise UserError(
            f"--validation-share {validation_share} and --test-share {test_share} leave nothing to train on: "
            "together they must stay below 1"
        )
    distinct = np.unique(np.array(spool.hashes, dtype=np.uint64))
    if len(distinct) < len(SPLITS):
        return _cut(spool, validation_share, test_share), (
            f"the corpus has only {len(distinct)} distinct document{'s' if len(distinct) > 1 else ''}: "
            "cut at paragraph ends into contiguous parts (train, then validation, then test), "
            "so the splits are of the same work"
        )
    # Sorted by hash, the first documents are validation, the next ones test: documents of equal text stay together, and
    # a document keeps its side when others are added (but for the rounding of the shares to at least one document).
    validation_end, test_end = (
        int(np.searchsorted(distinct, np.uint64(share * 2**64)))
        for share in (validation_share, validation_share + test_share)
    )
    validation_end = min(max(validation_end, 1), len(distinct) - 2)
    test_end = min(max(test_end, validation_end + 1), len(distinct) - 1)
    bounds = distinct[[validation_end, test_end]]
    order = ("validation", "test", "train")
    sides = np.searchsorted(bounds, np.array(spool.hashes, dtype=np.uint64), side="right")
    return _gather(spool.extents, [order[side] for side in sides]), "by whole documents, by a hash of their text"


def _gather(extents: list[Extent], chosen: list[str]) -> dict[str, list[Extent]]:
    splits: dict[str, list[Extent]] = {name: [] for name in SPLITS}
    for extent, name in zip(extents, chosen, strict=True):
        splits[name].append(extent)
    return splits


def _cut(spool: Spool, validation_share: float, test_share: float) -> dict[str, list[Extent]]:
    """Cuts each distinct document into a part for each split."""
    splits: dict[str, list[Extent]] = {name: [] for name in SPLITS}
    for title, begin, end in dict(zip(spool.hashes, spool.extents, strict=True)).values():
        data = spool.read_bytes(Extent(title, begin, end))
        slack = int(len(data) * min(validation_share, test_share) / 4)
        targets = (1 - validation_share - test_share, 1 - test_share)
        cuts = [0, *(_cut_position(data, int(len(data) * share), slack) for share in targets), len(data)]
        for name, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
            if data[start:stop].strip():
                splits[name].append(Extent(f"{title} ({name} part)", begin + start, begin + stop))
    return splits


def _cut_position(data: bytes, target: int, slack: int) -> int:
    """The end of a paragraph near `target` bytes; else of a line, of a word, of a character."""
    for separator in (b"\n\n", b"\n", b" "):
        found = data.rfind(separator, max(target - slack, 0), target + slack)
        if found >= 0:
            return found + len(separator)
    while 0 < target < len(data) and data[target] & 0xC0 == 0x80:  # inside a UTF-8 character
        target -= 1
    return target
