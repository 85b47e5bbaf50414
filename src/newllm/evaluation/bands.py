"""What a perplexity says about the run behind it: the bands of SYSTEMS §16, scaled to the tokenizer."""

from __future__ import annotations

import math
from typing import Any

REFERENCE_BYTES_PER_TOKEN = 1 / 0.29335
"""UTF-8 bytes per token of a ~50k vocabulary, for which the bands hold: GPT-2's on the Pile (Gao et al. 2020, §3.1)."""

BANDS: list[tuple[float, str, str]] = [
    (5, "leak or broken mask", "too good to be true: run `newllm check` on the model; invalid until causality passes"),
    (30, "suspect overlap", "very good: check that the held-out text does not occur in the training text"),
    (100, "normal", "a well trained model"),
    (500, "normal, short training", "usual for a small model or a small budget; more tokens will lower it"),
    (1000, "high", "little more than word frequencies: more tokens, or another learning rate"),
    (math.inf, "undertrained", "train longer, or look for a learning rate that diverges or is too low"),
]
"""(upper bound of the perplexity at the reference tokenizer, name, advice)"""


def ppl_band(ppl: float, bytes_per_token: float) -> dict[str, Any]:
    """{"band", "advice", "scaled_bounds"} of a perplexity per token of a tokenizer with so many UTF-8 bytes per token.

    Equal bits per byte mean equal quality: a bound P at the reference is log2(P) / reference bits per byte, which is
    P ** (bytes_per_token / reference) for this tokenizer. "scaled_bounds" are the five finite bounds in that scale.
    """
    bounds = [bound ** (bytes_per_token / REFERENCE_BYTES_PER_TOKEN) for bound, _, _ in BANDS[:-1]]
    if not math.isfinite(ppl):
        advice = "the loss is not a finite number: lower --lr, or look for a division by zero in the layer"
        return {"band": "not finite", "advice": advice, "scaled_bounds": bounds}
    _, band, advice = BANDS[sum(ppl >= bound for bound in bounds)]
    return {"band": band, "advice": advice, "scaled_bounds": bounds}
