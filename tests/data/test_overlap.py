import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm.data import overlap
from newllm.data.overlap import NGRAM_WORDS, ngram_hashes, overlap_shares


def words(start, count):
    return " ".join(f"word{i}" for i in range(start, start + count))


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=60))
def test_equal_hashes_mean_equal_ngrams(sequence):
    hashes = ngram_hashes(" ".join(sequence))
    ngrams = [tuple(sequence[i : i + NGRAM_WORDS]) for i in range(len(sequence) - NGRAM_WORDS + 1)]
    assert len(hashes) == len(ngrams)
    assert len(set(hashes.tolist())) == len(set(ngrams))


def test_case_and_punctuation_do_not_hide_a_copy():
    text = words(0, 30)
    assert np.array_equal(ngram_hashes(text), ngram_hashes(text.upper().replace(" ", ",\n")))


def test_known_shares():
    held_out = {
        "copy": [words(100, 40)],
        "none": [words(5000, 40)],
        "half": [words(0, 32), words(9000, 32)],
        "short": ["a b"],
    }
    shares = overlap_shares([words(0, 500), words(600, 50)], held_out)
    assert shares == {"copy": 1.0, "none": 0.0, "half": 0.5, "short": None}


def test_large_splits_are_sampled_evenly(monkeypatch):
    exact = overlap_shares([words(0, 10_000)], {"test": [words(5_000, 10_000)]})["test"]
    monkeypatch.setattr(overlap, "MOST_NGRAMS", 2_000)
    texts = [words(start, 1_000 + NGRAM_WORDS - 1) for start in range(5_000, 15_000, 1_000)]
    assert len(overlap._sample(texts)) <= 2_000
    assert overlap_shares([words(0, 10_000)], {"test": texts})["test"] == pytest.approx(exact, abs=0.05)
