from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.data import TokenFile
from newllm.data.windows import StreamDataset, WindowDataset
from newllm.ops.loss import IGNORED

document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def token_file(lengths):
    """Documents of the given lengths in which every token is its own position."""
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    return TokenFile(np.arange(starts[-1], dtype=np.uint16), starts, int(starts[-1]), [str(n) for n in lengths])


@given(document_lengths, st.integers(1, 50))
def test_windows_are_contiguous_and_cover_all_but_the_rest(lengths, seq_length):
    tokens = token_file(lengths)
    windows = WindowDataset(tokens, seq_length)
    seen = [item["input_ids"].tolist() for item in (windows[i] for i in range(len(windows)))]
    assert all(len(window) == seq_length for window in seen)
    assert list(chain.from_iterable(seen)) == list(range(len(windows) * seq_length))
    assert len(tokens) - len(windows) * seq_length < seq_length


@given(document_lengths, st.integers(1, 10), st.integers(1, 30), st.integers(0, 5))
def test_samples_are_distinct_windows_chosen_by_the_seed(lengths, seq_length, samples, seed):
    tokens = token_file(lengths)
    every = WindowDataset(tokens, seq_length)
    chosen, again = (WindowDataset(tokens, seq_length, samples=samples, seed=seed) for _ in range(2))
    firsts = [int(chosen[i]["input_ids"][0]) for i in range(len(chosen))]
    assert len(firsts) == len(set(firsts)) == min(samples, len(every))
    assert set(firsts) <= {int(every[i]["input_ids"][0]) for i in range(len(every))}
    assert firsts == [int(again[i]["input_ids"][0]) for i in range(len(again))]


def test_another_seed_samples_other_windows():
    tokens = token_file([4000])
    first, second = (WindowDataset(tokens, 10, samples=20, seed=seed).windows for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_windows_are_int64_and_end_with_an_index_error():
    windows = WindowDataset(token_file([100]), 32)
    assert windows[0]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[3]


def batches(streams, passes=1):
    """The batches of the first passes, as a DataLoader gives them to the trainer."""
    sampler = range(passes * len(streams))
    return list(torch.utils.data.DataLoader(streams, batch_size=streams.batch_size, sampler=sampler))


@given(document_lengths, st.integers(1, 50), st.integers(1, 6), st.integers(0, 5))
def test_streams_read_every_token_once_and_rows_go_on(lengths, seq_length, batch_size, seed):
    tokens = token_file(lengths)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    streams = StreamDataset(tokens, seq_length, batch_size, seed)
    both = batches(streams, passes=2)
    for one_pass in (both[: streams.batches], both[streams.batches :]):
        seen = []
        rows = [[] for _ in range(batch_size)]
        since = [0] * batch_size  # tokens that a row has read since its last reset
        for batch in one_pass:
            assert batch["input_ids"].shape == batch["attention_mask"].shape == (batch_size, seq_length)
            assert batch["input_ids"].dtype == torch.int64
            assert batch["attention_mask"].dtype == batch["starts"].dtype == torch.bool
            mask, ids = batch["attention_mask"], batch["input_ids"]
            assert torch.equal(batch["labels"], torch.where(mask, ids, torch.full_like(ids, IGNORED)))
            for row in range(batch_size):
                chunk = ids[row][mask[row]].tolist()
                assert mask[row, : len(chunk)].all(), "padding is on the right"
                if not chunk:
                    assert not batch["starts"][row]
                    continue
                assert len(set(document_of[chunk])) == 1, "a chunk never crosses documents"
                first_of_row, first_of_document = not rows[row], chunk[0] in tokens.document_starts
                assert bool(batch["starts"][row]) == (first_of_row or first_of_document)
                if batch["starts"][row]:
                    since[row] = 0
                else:
                    assert rows[row][-1] + 1 == chunk[0], "a row goes on where it ended"
                assert batch["position_ids"][row, : len(chunk)].tolist() == [since[row] + n for n in range(len(chunk))]
                since[row] += len(chunk)
                rows[row] += chunk
                seen += chunk
        assert sorted(seen) == list(range(len(tokens)))


@given(document_lengths, st.integers(1, 50), st.integers(1, 6))
def test_rows_of_a_stream_end_together(lengths, seq_length, batch_size):
    """Whatever the documents, even where there is only one: no row waits for another for more than one batch."""
    streams = StreamDataset(token_file(lengths), seq_length, batch_size)
    for batch in batches(streams)[:-1]:
        assert batch["attention_mask"].any(dim=1).all()


def test_passes_differ_in_the_order_of_documents_and_any_item_can_be_asked_for():
    streams = StreamDataset(token_file([30] * 12), 10, 3, seed=1)
    ids = [batch["input_ids"] for batch in batches(streams, 2)]
    first, second = torch.cat(ids[: streams.batches]), torch.cat(ids[streams.batches :])
    assert not torch.equal(first, second)
    again = StreamDataset(token_file([30] * 12), 10, 3, seed=1)
    for index in (len(streams) + 5, 7, 2 * len(streams) + 1, len(streams) - 1):
        for name, value in streams[index].items():
            assert torch.equal(value, again[index][name])
    other = StreamDataset(token_file([30] * 12), 10, 3, seed=2)
    assert not torch.equal(first, torch.cat([batch["input_ids"] for batch in batches(other)]))
