"""Streaming training: rows go on from batch to batch, through the state that the batch before has left.

What is learned in one batch may thus use what was read many batches ago, as at inference, though no gradient goes back
there (truncated back-propagation through time). Which rows go on, and where, is `data.windows.StreamDataset`'s; that a
batch finds the state of the one before is `trainer.LMTrainer`'s.
"""

from __future__ import annotations

import torch

from newllm.models import create_model
from newllm.models.cache import TokenState
from newllm.models.layers import Layer
from newllm.settings import CommonSettings, UserError


def check_streaming(settings: CommonSettings, models: list[str]) -> None:
    """Raises UserError where --streaming cannot be: for models that keep every token, and with recall windows."""
    if not settings.streaming:
        return
    if settings.recall_share > 0:
        raise UserError(
            "--streaming reads documents from beginning to end, --recall-share makes windows that stand alone: "
            "choose one of them"
        )
    for model in models:
        with torch.device("meta"):
            built = create_model(
                model,
                hidden_size=settings.hidden_size,
                num_layers=settings.num_layers,
                num_heads=settings.num_heads,
                intermediate_size=settings.intermediate_size,
            )
        for number, layer in enumerate(built.layers):
            assert isinstance(layer, Layer)
            state = layer.make_state()
            if isinstance(state, TokenState) and state.window is None:
                raise UserError(
                    f"--streaming: layer {number} of {model} (type '{layer.type_name}') keeps every token it reads, "
                    f"and rows read on without end: {remedy(model, layer)}"
                )


def remedy(model: str, layer: Layer) -> str:
    """What to do about a layer whose state grows with the text."""
    if "window" not in layer.option_names():
        return f"a layer of type '{layer.type_name}' has no window; train this model without --streaming"
    return f"give it a window, as in {model}{',' if ':' in model else ':'}window=128"
