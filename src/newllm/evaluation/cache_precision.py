"""What quantising the cache of a trained model costs in perplexity, and saves in bytes: no training anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from newllm.evaluation.cache_size import cache_bytes
from newllm.evaluation.efficiency import cache_figures
from newllm.evaluation.perplexity import evaluate
from newllm.evaluation.reading import as_measured
from newllm.models.cache import TokenState
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import TokenFile
    from newllm.models import TransformerLM


def compare_precisions(
    model: TransformerLM, splits: dict[str, TokenFile], settings: CommonSettings, precisions: list[str]
) -> list[dict[str, Any]]:
    """One row for each precision of the cache, all on the same tokens of the same splits.

    The model reads every window through an empty cache of that precision and predicts from what it reads there. A row
    has cache_precision, dtype (of what grows with the text, or else of what the cache holds, or else of the model),
    cache_bytes_per_token and state_bytes (as in `efficiency.cache_figures`, at up to decode_context tokens), and for
    each split what `perplexity.evaluate` returns, with delta_loss: nats a token above the first precision.
    """
    rows: list[dict[str, Any]] = []
    for precision in precisions:
        row = {"cache_precision": precision, **cache_cost(model, next(iter(splits.values())), settings, precision)}
        for split, tokens in splits.items():
            result = evaluate(model, tokens, settings, precision)
            base = rows[0][split]["loss"] if rows else result["loss"]
            row[split] = result | {"delta_loss": result["loss"] - base}
        rows.append(row)
    return rows


def cache_cost(model: TransformerLM, tokens: TokenFile, settings: CommonSettings, precision: str) -> dict[str, Any]:
    """dtype, cache_bytes_per_token and state_bytes of one row, read from the tensors of the cache."""
    context = settings.decode_context
    assert context is not None
    measured = {}
    for length in (context // 2, context - context // 4, context):
        ids = torch.from_numpy(np.resize(tokens.ids, (1, length)).astype(np.int64)).to(model.device)
        cache = model.make_cache(precision)
        with as_measured(model, settings.precision):
            model.hidden_states(ids, past_key_values=cache)
        measured[length] = cache_bytes(cache)._asdict()
    figures = cache_figures(measured)
    # A recurrent state is stored as it is computed: the precision shows in the states that grow, where there are any.
    growing_first = sorted(cache.parts(), key=lambda state: not isinstance(state, TokenState))
    dtypes = [
        tensor.dtype
        for state in growing_first
        for tensor in state.tensors().values()
        if isinstance(state, TokenState) or tensor.is_floating_point()  # not what is counted there
    ]
    return {
        "dtype": str((dtypes or [model.dtype])[0]).removeprefix("torch."),
        **{key: figures[key] for key in ("cache_bytes_per_token", "state_bytes")},
    }
