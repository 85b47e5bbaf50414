"""What a model's gates let it leave out: perplexity weighted by them, beside that of all tokens. SYSTEMS §11."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from newllm.evaluation.perplexity import contiguous, perplexity, score
from newllm.models import SelectiveLM
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import TokenFile
    from newllm.models import TransformerLM


def selective_figures(model: TransformerLM, tokens: TokenFile, settings: CommonSettings) -> dict[str, Any] | None:
    """Perplexities of a SelectiveLM over the windows of training; None for another model.

    "ppl" counts every token once, from the pass that speaks: it is the one to compare with other models. "weighted_ppl"
    is what training minimises, exp(Σ a·ℓ / Σ a). "weight" is the mean of Σ_p a_p: how much of a token counted in it.
    "passes" has for every pass the perplexity if it alone spoke ("ppl"), the share of the tokens emitted from it
    ("emitted"), and its mean a ("weight").
    """
    if not isinstance(model, SelectiveLM):
        return None
    listener, spans = Listener(model), contiguous(tokens, settings)
    totals: dict[str, Any] = dict.fromkeys(("nats", "spoken", "emitted", "shares", "weighted"), 0.0)
    for batch in score(model, tokens.ids, spans, settings, token_losses=listener.token_losses):
        shares, losses, emitted = (x[:, batch.mask] for x in listener.heard)  # each (S + 1, tokens)
        totals["nats"] += losses.sum(axis=1)
        totals["spoken"] += float(batch.losses[batch.mask].sum())
        totals["emitted"] += emitted.sum(axis=1)
        totals["shares"] += shares.sum(axis=1)
        totals["weighted"] += float((shares * losses).sum())
    count = spans.num_scored
    weight = totals["shares"].sum()
    return {
        "ppl": perplexity(totals["spoken"] / count),
        "weighted_ppl": perplexity(totals["weighted"] / weight),
        "weight": float(weight / count),
        "max_skip": model.config.max_skip,
        "threshold": model.config.threshold,
        "must_emit": model.config.must_emit,
        "passes": [
            {"ppl": perplexity(float(nats / count)), "emitted": float(emitted / count), "weight": float(share / count)}
            for nats, emitted, share in zip(totals["nats"], totals["emitted"], totals["shares"], strict=True)
        ],
    }


class Listener:
    """Gives `score` the losses, and keeps of the last batch what every pass said."""

    heard: tuple[np.ndarray, np.ndarray, np.ndarray]
    """a, ℓ and whether the pass spoke, each (S + 1, B, T − 1)."""

    def __init__(self, model: SelectiveLM) -> None:
        self.model = model

    def token_losses(self, input_ids: Tensor) -> Tensor:
        losses, gates = self.model.pass_losses(input_ids)
        chosen = self.model.chosen_pass(gates)[None]
        spoke = torch.arange(len(gates), device=gates.device)[:, None, None] == chosen
        self.heard = tuple(x.double().cpu().numpy() for x in (self.model.shares(gates), losses, spoke))  # type: ignore[assignment]
        return losses.gather(0, chosen).squeeze(0)
