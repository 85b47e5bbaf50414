"""Token files: the ids of a split as one memory-mapped array, EOS after every document.

NAME.ids holds the ids (uint16 where the vocabulary fits, else uint32), NAME.json everything else.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from newllm.data.splits import Extent, Spool
from newllm.data.tokenizer import encode_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TokenFile:
    """The tokens of a split."""

    ids: np.ndarray
    """Token ids, (N,), uint16 or uint32, memory-mapped."""
    document_starts: np.ndarray
    """Position of each document's first token, and N at the end: (documents + 1,), int64."""
    num_bytes: int
    """UTF-8 bytes of the text; EOS is not counted."""
    titles: list[str]
    """One for each document."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1


def write_tokens(
    folder: Path, name: str, spool: Spool, extents: list[Extent], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Encodes the documents at `extents` into NAME.ids and NAME.json."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    starts, position = array("q", [0]), 0
    texts = (document.text for document in spool.read(extents))
    with (folder / f"{name}.ids").open("wb") as stream:
        for ids, ends_document in encode_documents(tokenizer, texts):
            if ends_document:
                ids = [*ids, tokenizer.eos_token_id]
            stream.write(np.array(ids, dtype=dtype).tobytes())
            position += len(ids)
            if ends_document:
                starts.append(position)
    description = {
        "dtype": dtype.name,
        "num_bytes": sum(extent.size for extent in extents),
        "document_starts": starts.tolist(),
        "titles": [extent.title for extent in extents],
    }
    (folder / f"{name}.json").write_text(json.dumps(description))


def read_tokens(folder: Path, name: str) -> TokenFile:
    """The token file NAME of a folder; the ids stay on disk until they are used."""
    description = json.loads((folder / f"{name}.json").read_text())
    ids = np.memmap(folder / f"{name}.ids", dtype=description["dtype"], mode="r")
    starts = np.array(description["document_starts"], dtype=np.int64)
    return TokenFile(ids, starts, description["num_bytes"], description["titles"])
