"""What a model that feeds a state back is worth by true recurrence, and after a few parallel passes.

Lagged Cache Training never computes the true states. So its loss says how well a model predicts that is given states of
an earlier iteration, and those know more than they should: a discrete pass has read every token, also where the model
itself would not. What counts is the model that reads token by token; how soon passes reach it is the other question.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from newllm.evaluation.perplexity import contiguous, perplexity, score, token_weighted_loss
from newllm.models.recurrent import RecurrentLM, lag
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import TokenFile
    from newllm.models import TransformerLM

PASSES = (1, 2, 3, 5, 8)
"""Numbers of passes that are measured; the first is what the origin measured."""


def recurrence_figures(model: TransformerLM, tokens: TokenFile, settings: CommonSettings) -> dict[str, Any] | None:
    """Perplexities over the windows of training; None for a model that feeds nothing back. settings must be resolved.

    "ppl" is by true recurrence. "passes" has, for each k of PASSES, {"passes": k, "ppl", "residual"}: k parallel
    passes, the first with the states of a discrete pass, each other with those of the one before it, moved on by one
    token; and ‖s^k − s^(k−1)‖ / ‖s^k‖ over all tokens, s^0 being the states of the discrete pass.
    """
    if not isinstance(model, RecurrentLM) or not model.state_size:
        return None
    iterations, spans = Iterations(model), contiguous(tokens, settings)
    total = np.zeros(len(PASSES))
    for batch in score(model, tokens.ids, spans, settings, token_losses=iterations.token_losses):
        total += batch.losses[:, batch.mask].sum(axis=1)
    return {
        "ppl": perplexity(token_weighted_loss(model, tokens, settings)),
        "passes": [
            {"passes": passes, "ppl": perplexity(loss / spans.num_scored), "residual": iterations.residual(passes)}
            for passes, loss in zip(PASSES, total.tolist(), strict=True)
        ],
    }


class Iterations:
    """Parallel passes over batches, and how far each has moved the states."""

    def __init__(self, model: RecurrentLM) -> None:
        self.model = model
        self.moved, self.size = [0.0] * max(PASSES), [0.0] * max(PASSES)  # squared, over all batches

    def token_losses(self, input_ids: Tensor) -> Tensor:
        """As `TransformerLM.token_losses`, after each of PASSES: (len(PASSES), B, T − 1)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        states, losses = self.model.first_states(input_ids, positions), []
        for number in range(max(PASSES)):
            before = states
            hidden, states = self.model.iterate(input_ids, lag(before), positions=positions)
            self.moved[number] += float((states.float() - before.float()).square().sum())
            self.size[number] += float(states.float().square().sum())
            if number + 1 in PASSES:
                losses.append(self.model.losses_of(hidden, input_ids))
        return torch.stack(losses)

    def residual(self, passes: int) -> float:
        return math.sqrt(self.moved[passes - 1] / max(self.size[passes - 1], math.ulp(0.0)))
