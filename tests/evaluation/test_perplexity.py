"""Perplexity: what is scored, with which context, and that it is what training computes."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.errors import UserError
from newllm.evaluation import perplexity as pp
from newllm.evaluation.bands import BANDS, REFERENCE_BYTES_PER_TOKEN, ppl_band
from newllm.models import create_model
from newllm.settings import RunSettings


@dataclass
class Tokens:
    """Documents of distinct token ids, each ending in EOS = 0, so that a scored id names its place."""

    lengths: list[int]
    ids: np.ndarray = field(init=False)
    document_starts: np.ndarray = field(init=False)
    num_bytes: int = field(init=False)

    def __post_init__(self):
        self.document_starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self.ids = np.arange(1, self.document_starts[-1] + 1, dtype=np.uint32)
        self.ids[self.document_starts[1:] - 1] = 0
        self.num_bytes = 3 * len(self.ids)


class Pairs(torch.nn.Module):
    """A fake model whose loss for the token at p + 1 is a function of the tokens at p and p + 1."""

    device = torch.device("cpu")

    def token_losses(self, input_ids):
        return loss_of(input_ids[:, :-1], input_ids[:, 1:])


def loss_of(before, token):
    return ((before * 7 + token * 13) % 11).float() / 4 + 0.5


def settings(**values) -> RunSettings:
    defaults = {"seq_length": 8, "eval_batch_size": 3, "sliding_window": 8, "sliding_stride": 3, "precision": "float32"}
    values = defaults | values
    return RunSettings(**({"position_window": values["seq_length"]} | values))


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(lengths, st.integers(2, 20), st.data())
def test_sliding_scores_every_token_once_with_its_context_and_never_across_documents(lengths, window, data):
    tokens = Tokens(lengths)
    stride = data.draw(st.integers(1, window - 1))
    spans = pp.sliding_spans(tokens.document_starts, window, stride)
    document = np.repeat(np.arange(len(lengths)), lengths)
    scored = []
    for start, first, stop in zip(spans.start, spans.first, spans.stop, strict=True):
        assert stop - start <= window
        begin = tokens.document_starts[document[first]]
        assert stop <= tokens.document_starts[document[first] + 1]
        assert start >= begin - 1  # the separator, never another document's text
        assert first - start >= window - stride or start == begin - 1
        scored += range(first, stop)
    assert scored == list(range(len(tokens.ids)))


@given(lengths, st.integers(2, 20))
def test_contiguous_windows_score_every_token_once(lengths, seq_length):
    tokens = Tokens(lengths)
    spans = pp.contiguous_spans(len(tokens.ids), seq_length)
    assert [i for a, b in zip(spans.first, spans.stop, strict=True) for i in range(a, b)] == list(
        range(len(tokens.ids))
    )
    assert (spans.stop - spans.start <= seq_length).all()
    assert (spans.first == spans.start + 1).all()


@given(lengths, st.integers(1, 300))
def test_a_limit_scores_no_token_twice_and_comes_close(lengths, max_tokens):
    spans = pp.contiguous_spans(sum(lengths), 8)
    limited = pp.limit(spans, max_tokens)
    assert 0 < limited.num_scored <= max_tokens
    assert limited.num_scored >= min(max_tokens, spans.num_scored) - 7
    assert len(set(limited.first.tolist())) == len(limited)


@given(lengths, st.integers(2, 12))
def test_the_mean_is_token_weighted_and_every_plan_feeds_the_right_rows(lengths, seq_length):
    tokens, model = Tokens(lengths), Pairs()
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    before = torch.cat([ids[-1:], ids[:-1]])
    expected = loss_of(before, ids).double()
    mean = pp.token_weighted_loss(model, tokens, settings(seq_length=seq_length))
    assert mean == pytest.approx(expected.mean().item())
    result = pp.evaluate(model, tokens, settings(seq_length=seq_length))
    assert result["loss"] == mean
    assert result["ppl"] == pytest.approx(math.exp(mean))
    assert result["tokens"] == result["sliding"]["tokens"] == len(ids)
    assert result["bits_per_byte"] == pytest.approx(expected.sum().item() / math.log(2) / tokens.num_bytes)
    # this model looks back by one token only, so that all plans agree
    assert result["sliding_ppl"] == pytest.approx(result["ppl"])
    assert result["segment_ppl"] == pytest.approx(result["ppl"])


@given(lengths, st.integers(2, 40))
def test_position_ranges_add_up_to_the_whole(lengths, seq_length):
    tokens = Tokens(lengths)
    result = pp.evaluate(Pairs(), tokens, settings(seq_length=seq_length))
    ranges = [entry for entry in result["ppl_by_position"] if entry["tokens"]]
    assert sum(entry["tokens"] for entry in ranges) == result["tokens"]
    nats = sum(math.log(entry["ppl"]) * entry["tokens"] for entry in ranges)
    assert nats / result["tokens"] == pytest.approx(result["loss"])
    parts, share = result["recall"], result["recall"]["repeated_share"]
    nats = sum(w * math.log(parts[k]) for k, w in (("repeated", share), ("other", 1 - share)) if parts[k] is not None)
    assert nats == pytest.approx(result["loss"])


def test_position_windows_may_be_longer_than_training():
    result = pp.evaluate(Pairs(), Tokens([100]), settings(seq_length=20, position_window=40))
    beyond = {(entry["from"], entry["to"]): entry["beyond_training"] for entry in result["ppl_by_position"]}
    assert beyond == {(0, 16): False, (16, 32): True, (32, 40): True}
    assert sum(entry["tokens"] for entry in result["ppl_by_position"]) == 100


def test_position_ranges():
    assert pp.position_ranges(128) == [(0, 16), (16, 32), (32, 64), (64, 96), (96, 128)]
    assert pp.position_ranges(300)[-2:] == [(128, 256), (256, 300)]
    assert pp.position_ranges(17) == [(0, 16)]


@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 1000))
def test_recall_split_equals_a_naive_loop(rows, length, seed):
    input_ids = np.random.default_rng(seed).integers(0, 4, (rows, length))
    expected = np.zeros((rows, length - 1), dtype=bool)
    for b, row in enumerate(input_ids.tolist()):
        seen = set()
        for p in range(length - 1):
            expected[b, p] = (row[p], row[p + 1]) in seen
            seen.add((row[p], row[p + 1]))
    assert (pp.completes_seen_bigram(input_ids) == expected).all()


def test_a_text_without_repetition_has_no_perplexity_of_repeated_tokens():
    recall = pp.evaluate(Pairs(), Tokens([20]), settings())["recall"]
    assert recall["repeated"] is None
    assert recall["repeated_share"] == 0


def test_a_stride_without_context_is_the_users_error():
    with pytest.raises(UserError, match="--sliding-stride 8 leaves no context"):
        pp.evaluate(Pairs(), Tokens([20]), settings(sliding_stride=8))


def test_training_mode_is_restored():
    model = Pairs().train()
    pp.token_weighted_loss(model, Tokens([20]), settings())
    assert model.training


def test_bands_hold_at_the_reference_and_scale_with_the_tokenizer():
    names = [ppl_band(ppl, REFERENCE_BYTES_PER_TOKEN)["band"] for ppl in (3, 20, 60, 200, 700, 5000)]
    assert names == [name for _, name, _ in BANDS]
    assert ppl_band(60, REFERENCE_BYTES_PER_TOKEN)["scaled_bounds"] == pytest.approx([5, 30, 100, 500, 1000])
    # with half the bytes per token, the same bits per byte are the square root of the perplexity
    assert ppl_band(math.sqrt(60), REFERENCE_BYTES_PER_TOKEN / 2)["band"] == "normal"
    assert ppl_band(math.nan, 3.0)["band"] == "not finite"


def advice(ppl, **known):
    return ppl_band(ppl, REFERENCE_BYTES_PER_TOKEN, **known)["advice"]


def test_advice_asks_only_for_what_is_not_known_yet():
    assert "run `newllm check`" in advice(3)
    assert "run `newllm check`" in advice(3, overlap=0.5), "no overlap excuses a leak"
    assert "a causality check fails: the run is invalid" in advice(3, causal=False, overlap=0.5)
    for ppl in (3, 20):
        assert "newllm check" not in advice(ppl, causal=True)
        assert "check that the held-out text does not occur" in advice(ppl, causal=True)
        copied = advice(ppl, causal=True, overlap=0.123)
        assert "12.30% of the held-out 13-word sequences occur in the training text" in copied
        assert "text already seen" in copied
        clean = advice(ppl, causal=True, overlap=0.0)
        assert "0.00% of the held-out 13-word sequences" in clean
        assert "too few to explain it" in clean
    assert "the causality checks can find, they pass" in advice(3, causal=True, overlap=0.0)
    assert advice(60, causal=True, overlap=0.5) == advice(60), "a usual perplexity needs no explanation"


def test_a_models_training_loss_and_its_evaluation_are_the_same_number():
    """Over whole windows, the mean of the losses the Trainer minimises is the validation loss."""
    model = create_model("pythia", hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, vocab_size=64)
    tokens = Tokens([30, 1, 50])
    tokens.ids = (tokens.ids * 7) % 64
    config = settings(seq_length=10, eval_batch_size=4)
    ids = torch.from_numpy(np.concatenate((tokens.ids[-1:], tokens.ids)).astype(np.int64))  # the separator, the split
    windows = torch.stack([ids[start : start + 10] for start in range(0, 81, 9)])
    training = model.train()(windows, labels=windows).loss
    assert pp.token_weighted_loss(model, tokens, config) == pytest.approx(training.item(), abs=1e-5)


def test_long_rows_see_only_their_own_window():
    """Fresh state for each window: a model's loss on a window does not depend on the windows before it."""
    model = create_model("pythia", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=64)
    first, second = Tokens([45]), Tokens([45])
    first.ids, second.ids = first.ids % 64, second.ids % 64
    second.ids[:20] = 5  # another beginning
    window = pp.contiguous_spans(45, 10)[4:5]
    losses = [next(pp.score(model, tokens.ids, window, settings(seq_length=10))).losses for tokens in (first, second)]
    assert np.array_equal(*losses)
