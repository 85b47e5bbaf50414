"""Do the splits share text? The share of 13-word n-grams of the held-out splits that also occur in training.

The n-gram length, and words without case and punctuation, follow Brown et al., 2020 (GPT-3), appendix C.
Separate documents can still quote or copy each other; a perplexity is only as good as this share is small.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

NGRAM_WORDS = 13
MOST_NGRAMS = 4_000_000
"""Held-out n-grams kept at most (8 bytes each); beyond it, an even sample of them by their hash."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def ngram_hashes(text: str) -> np.ndarray:
    """A 64-bit hash of every n-gram of consecutive words in the text: (words - 12,), uint64."""
    words = re.findall(r"\w+", text.lower())
    codes = np.fromiter((zlib.crc32(word.encode("utf-8")) for word in words), dtype=np.uint64, count=len(words))
    count = max(len(words) - NGRAM_WORDS + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(NGRAM_WORDS if count else 0):
        hashes = (hashes ^ codes[offset : offset + count]) * MULTIPLIER  # arithmetic modulo 2^64
        hashes ^= hashes >> np.uint64(29)
    return hashes


def overlap_shares(train: Iterable[str], held_out: dict[str, Iterable[str]]) -> dict[str, float | None]:
    """For each held-out split, the share of its distinct n-grams that occur in the training texts.

    None where it has no n-gram, all its documents being shorter: that says nothing about what they share.

    Memory is bounded by the held-out n-grams; the training texts pass by one at a time.
    """
    wanted = {name: _sample(texts) for name, texts in held_out.items()}
    found = {name: np.zeros(len(hashes), dtype=bool) for name, hashes in wanted.items()}
    for hashes in _hashes(train):
        for name, sample in wanted.items():
            if len(sample):
                position = np.minimum(np.searchsorted(sample, hashes), len(sample) - 1)
                found[name][position[sample[position] == hashes]] = True
    return {name: float(hits.mean()) if len(hits) else None for name, hits in found.items()}


def _hashes(texts: Iterable[str]) -> Iterator[np.ndarray]:
    return (ngram_hashes(text) for text in texts)


def _sample(texts: Iterable[str]) -> np.ndarray:
    """Sorted distinct n-gram hashes, every 2^k-th by value where there are more than MOST_NGRAMS."""
    kept, shift, kept_count, buffer = np.zeros(0, dtype=np.uint64), 0, 0, []
    for hashes in _hashes(texts):
        buffer.append(hashes[hashes >> np.uint64(64 - shift) == 0] if shift else hashes)
        kept_count += len(buffer[-1])
        while kept_count > MOST_NGRAMS:
            kept = np.unique(np.concatenate([kept, *buffer]))
            buffer, kept_count = [], len(kept)
            if kept_count > MOST_NGRAMS // 2:
                shift += 1
                kept = kept[kept >> np.uint64(64 - shift) == 0]
                kept_count = len(kept)
    return np.unique(np.concatenate([kept, *buffer]))
