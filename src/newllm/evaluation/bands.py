"""What a perplexity says about the run behind it: the bands of SYSTEMS §16, scaled to the tokenizer."""

from __future__ import annotations

import math
from typing import Any

from newllm.data.overlap import NGRAM_WORDS

REFERENCE_BYTES_PER_TOKEN = 1 / 0.29335
"""UTF-8 bytes per token of a ~50k vocabulary, for which the bands hold: GPT-2's on the Pile (Gao et al. 2020, §3.1)."""

LEAK, OVERLAP = "suspect leak", "suspect overlap"
BANDS: list[tuple[float, str, str]] = [
    (5, LEAK, ""),
    (30, OVERLAP, ""),
    (100, "normal", "a well trained model"),
    (500, "normal, short training", "usual for a small model or a small budget; more tokens will lower it"),
    (1000, "high", "little more than word frequencies: more tokens, or another learning rate"),
    (math.inf, "undertrained", "train longer, or look for a learning rate that diverges or is too low"),
]
"""(upper bound of the perplexity at the reference tokenizer, name, advice); what is suspected is looked up first."""
SMALL_OVERLAP = 0.01
"""Up to this share of the held-out n-grams that occur in training, overlap cannot explain a perplexity."""


def ppl_band(
    ppl: float, bytes_per_token: float, *, causal: bool | None = None, overlap: float | None = None
) -> dict[str, Any]:
    """{"band", "advice", "scaled_bounds"} of a perplexity per token of a tokenizer with so many UTF-8 bytes per token.

    Equal bits per byte mean equal quality: a bound P at the reference is log2(P) / reference bits per byte, which is
    P ** (bytes_per_token / reference) for this tokenizer. "scaled_bounds" are the five finite bounds in that scale.

    Args:
        causal: whether the model's causality checks pass; None where they were not made.
        overlap: share of the split's n-grams that occur in the training text; None where that is not known.
    """
    bounds = [bound ** (bytes_per_token / REFERENCE_BYTES_PER_TOKEN) for bound, _, _ in BANDS[:-1]]
    if not math.isfinite(ppl):
        advice = "the loss is not a finite number: lower --lr, or look for a division by zero in the layer"
        return {"band": "not finite", "advice": advice, "scaled_bounds": bounds}
    _, band, advice = BANDS[sum(ppl >= bound for bound in bounds)]
    if band in (LEAK, OVERLAP):
        advice = _suspicion(band, causal, overlap)
    return {"band": band, "advice": advice, "scaled_bounds": bounds}


def _suspicion(band: str, causal: bool | None, overlap: float | None) -> str:
    """What to make of a low perplexity: what the checks and the overlap have said already, or what to look at."""
    if band == LEAK and causal is False:
        return "too good to be true, and a causality check fails: the run is invalid until it passes"
    if band == LEAK and causal is None:
        return "too good to be true: run `newllm check` on the model; invalid until causality passes"
    leak = "it is no leak that the causality checks can find, they pass; " if band == LEAK else ""
    if overlap is None:
        return f"{leak}check that the held-out text does not occur in the training text"
    found = f"{overlap:.2%} of the held-out {NGRAM_WORDS}-word sequences occur in the training text"
    if overlap > SMALL_OVERLAP:
        return f"{leak}{found}: it is in part the perplexity of text already seen; split the text anew"
    return f"{leak}{found}, too few to explain it: an easy text, or a very good model"
