"""Perplexity of a model on held-out tokens (SYSTEMS §13): five views of one list of losses per token.

Every view is a plan of spans: the model reads `ids[start:stop]` with fresh state and the tokens `ids[first:stop]` are
scored, each with what stands before it in the span as context. The plans differ only in how they cut the split:

- contiguous: windows as long as in training; their mean loss is *the* loss, also split by recall;
- by position: windows that may be longer than in training;
- sliding: long windows that advance by a stride and never leave a document;
- segments: the sliding window's steps without the context before them, which is what a model is worth that is fed
  text piece by piece and remembers nothing. A warning, not a result.

A split is documents in a row, each ending in the separator EOS. Position −1 is therefore a separator too (the split's
last token), so that the first token is scored like every other: each plan of a whole split scores every token once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from newllm.errors import UserError
from newllm.evaluation.reading import as_measured
from newllm.models.recurrent import RecurrentLM
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import TokenFile
    from newllm.models import TransformerLM


RECURRENT_ROWS = 8
"""How many times as many rows a batch has for a model that reads token by token: the loop over time is what costs."""


@dataclass(frozen=True)
class Spans:
    """The model reads ids[start:stop], ids[first:stop] are scored; −1 ≤ start < first < stop. Each (S,) int64."""

    start: np.ndarray
    first: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: Any) -> Spans:
        return Spans(self.start[index], self.first[index], self.stop[index])

    @property
    def num_scored(self) -> int:
        return int((self.stop - self.first).sum())


def contiguous_spans(num_tokens: int, seq_length: int) -> Spans:
    """Windows of seq_length inputs, each overlapping the one before by one token; the last may be shorter.

    As in a training window, seq_length inputs give seq_length − 1 losses.
    """
    first = np.arange(0, num_tokens, seq_length - 1)
    return Spans(first - 1, first, np.minimum(first + seq_length - 1, num_tokens))


def sliding_spans(document_starts: np.ndarray, window: int, stride: int) -> Spans:
    """Windows of at most `window` inputs within one document, each scoring the next `stride` tokens.

    document_starts: (documents + 1,). Every token is scored once. Its context is at least window − stride tokens, or
    all of its document before it, whichever is less; before the document's first token stands the separator.
    """
    if stride >= window:
        raise UserError(
            f"--sliding-stride {stride} leaves no context in --sliding-window {window}: choose a smaller one"
        )
    spans = []
    for begin, end in pairwise(document_starts.tolist()):
        first = np.concatenate(([begin], np.arange(begin + window - 1, end, stride)))
        stop = np.append(first[1:], end)
        spans.append(np.stack([np.maximum(stop - window, begin - 1), first, stop]))
    return Spans(*np.concatenate(spans, axis=1))


def limit(spans: Spans, max_tokens: int | None) -> Spans:
    """Spans spread evenly over the split which together score at most max_tokens; None keeps all of them."""
    total = spans.num_scored
    if max_tokens is None or max_tokens >= total:
        return spans
    count = math.ceil(max_tokens * len(spans) / total)
    chosen = spans[np.linspace(0, len(spans) - 1, count).round().astype(np.int64)]
    surplus = np.cumsum(chosen.stop - chosen.first) - max_tokens
    chosen = Spans(chosen.start, chosen.first, chosen.stop - np.maximum(surplus, 0))
    return chosen[chosen.first < chosen.stop]


@dataclass(frozen=True)
class Scored:
    """Losses of a batch of spans: entry (b, p) is the prediction made at input p, of the token at input p + 1."""

    losses: np.ndarray  # (B, L - 1) float64, nats
    mask: np.ndarray  # (B, L - 1) bool, True where the token is one the span scores
    input_ids: np.ndarray  # (B, L) int64


def score(
    model: TransformerLM,
    ids: np.ndarray,
    spans: Spans,
    settings: CommonSettings,
    cache_precision: str | None = None,
    token_losses: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Scored]:
    """The losses of all spans, batch by batch, longest first (little padding), in evaluation mode, with fresh state.

    A batch holds about as many tokens as eval_batch_size training windows. Shorter rows are padded on the right,
    which a causal model cannot see.

    cache_precision: see `TransformerLM.token_losses`. token_losses: takes its place, and may give several kinds of
    losses (…, B, L − 1).
    """
    batch_tokens = settings.eval_batch_size * settings.seq_length  # type: ignore[operator]
    if token_losses is None and isinstance(model, RecurrentLM) and model.state_size:
        batch_tokens *= RECURRENT_ROWS
    options: dict[str, Any] = {} if cache_precision is None else {"cache_precision": cache_precision}
    read = token_losses or (lambda input_ids: model.token_losses(input_ids, **options))
    length = spans.stop - spans.start
    spans, length = spans[order := np.argsort(-length, kind="stable")], length[order]
    begin = 0
    while begin < len(spans):
        rows = max(1, batch_tokens // int(length[begin]))
        batch = spans[begin : begin + rows]
        begin += rows
        position = batch.start[:, None] + np.arange((batch.stop - batch.start).max())  # (B, L)
        input_ids = np.asarray(ids[np.minimum(position, len(ids) - 1)]).astype(np.int64)
        with as_measured(model, settings.precision):  # not while its losses are used
            losses = read(torch.from_numpy(input_ids).to(model.device))  # (B, L - 1)
        target = position[:, 1:]
        mask = (target >= batch.first[:, None]) & (target < batch.stop[:, None])
        yield Scored(losses.double().cpu().numpy(), mask, input_ids)


def token_weighted_loss(model: TransformerLM, tokens: TokenFile, settings: CommonSettings) -> float:
    """Mean loss in nats per token over contiguous windows: the validation loss, equal to `evaluate`'s "loss"."""
    return _mean_loss(model, tokens.ids, contiguous(tokens, settings), settings)


def evaluate(
    model: TransformerLM, tokens: TokenFile, settings: CommonSettings, cache_precision: str | None = None
) -> dict[str, Any]:
    """All perplexities of a split; settings must be resolved. Works for any model with `token_losses`.

    With a cache_precision the model reads through a cache of that precision, see `TransformerLM.token_losses`.

    "bits_per_byte" is the loss per token times the split's tokens per byte: total bits / total bytes, exactly, when the
    whole split is scored, and an estimate when eval_tokens limits it. A separator costs bits but counts no byte.
    "ppl_by_position" counts from the input at which a prediction is made: 0 sees one token. It is taken over windows of
    position_window tokens, so that it may go beyond what training showed.
    """
    spans = contiguous(tokens, settings)
    total, count = 0.0, 0
    recall_total, recall_count = np.zeros(2), np.zeros(2, dtype=np.int64)
    for batch in score(model, tokens.ids, spans, settings, cache_precision):
        losses = np.where(batch.mask, batch.losses, 0.0)
        total += float(losses.sum())
        count += int(batch.mask.sum())
        repeated = completes_seen_bigram(batch.input_ids)
        for index, chosen in enumerate((repeated, ~repeated)):
            recall_total[index] += losses[chosen].sum()
            recall_count[index] += (chosen & batch.mask).sum()

    loss = total / count
    window, stride = settings.sliding_window, settings.sliding_stride
    assert window is not None
    assert stride is not None
    sliding = limit(sliding_spans(tokens.document_starts, window, stride), settings.eval_tokens)
    segments = limit(contiguous_spans(len(tokens.ids), stride + 1), settings.eval_tokens)
    return {
        "loss": loss,
        "ppl": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * len(tokens.ids) / tokens.num_bytes,
        "tokens": count,
        "ppl_by_position": ppl_by_position(model, tokens, settings, cache_precision),
        "sliding_ppl": perplexity(_mean_loss(model, tokens.ids, sliding, settings, cache_precision)),
        "sliding": {"window": window, "stride": stride, "tokens": sliding.num_scored},
        "segment_ppl": perplexity(_mean_loss(model, tokens.ids, segments, settings, cache_precision)),
        "recall": {
            "repeated": _ratio(recall_total[:1], recall_count[:1]),
            "other": _ratio(recall_total[1:], recall_count[1:]),
            "repeated_share": float(recall_count[0] / recall_count.sum()),
        },
    }


def ppl_by_position(
    model: TransformerLM, tokens: TokenFile, settings: CommonSettings, cache_precision: str | None = None
) -> list[dict[str, Any]]:
    """Perplexity of the predictions made in each range of positions of windows of position_window tokens."""
    window = settings.position_window
    assert window is not None
    total, count = np.zeros(window - 1), np.zeros(window - 1, dtype=np.int64)
    spans = limit(contiguous_spans(len(tokens.ids), window), settings.eval_tokens)
    for batch in score(model, tokens.ids, spans, settings, cache_precision):
        width = batch.losses.shape[1]
        total[:width] += np.where(batch.mask, batch.losses, 0.0).sum(axis=0)
        count[:width] += batch.mask.sum(axis=0)
    return [
        {
            "from": low,
            "to": high,
            "ppl": _ratio(total[low:high], count[low:high]),
            "tokens": int(count[low:high].sum()),
            "beyond_training": high > settings.seq_length,  # type: ignore[operator]
        }
        for low, high in position_ranges(window)
    ]


def position_ranges(seq_length: int) -> list[tuple[int, int]]:
    """0–16, 16–32, 32–64, 64–96, 96–128, then doubling, cut at the window; the last input predicts nothing."""
    edges = [0, 16, 32, 64, 96, 128]
    while edges[-1] < seq_length:
        edges.append(2 * edges[-1])
    return [(low, min(high, seq_length)) for low, high in pairwise(edges) if low < seq_length - 1]


def completes_seen_bigram(input_ids: np.ndarray) -> np.ndarray:
    """(B, L - 1) bool: True where the pair of tokens p, p + 1 stands earlier in the same row: it can be recalled.

    input_ids: (B, L) int64.
    """
    base = int(input_ids.max()) + 1
    bigram = input_ids[:, :-1] * base + input_ids[:, 1:]
    bigram = bigram + np.arange(len(bigram))[:, None] * base**2  # rows do not see each other
    repeated = np.ones(bigram.size, dtype=bool)
    repeated[np.unique(bigram, return_index=True)[1]] = False  # the index of each bigram's first occurrence
    return repeated.reshape(bigram.shape)


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that leaves float64."""
    return math.exp(loss) if not loss > 709 else math.inf


def contiguous(tokens: TokenFile, settings: CommonSettings) -> Spans:
    assert settings.seq_length is not None
    return limit(contiguous_spans(len(tokens.ids), settings.seq_length), settings.eval_tokens)


def _mean_loss(
    model: TransformerLM, ids: np.ndarray, spans: Spans, settings: CommonSettings, cache_precision: str | None = None
) -> float:
    batches = score(model, ids, spans, settings, cache_precision)
    return sum(float(batch.losses[batch.mask].sum()) for batch in batches) / spans.num_scored


def _ratio(total: np.ndarray, count: np.ndarray) -> float | None:
    """Perplexity of a group of tokens; None where it has none."""
    return perplexity(float(total.sum() / count.sum())) if count.sum() else None
