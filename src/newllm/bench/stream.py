"""A model that reads a text longer than it could remember word for word, and caches that are filled instead of read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from newllm.models.cache import LayerState, TokenState


class Stream:
    """One row of text, read from its beginning, with what a model remembers of it.

    States of fixed size truly read every token. Those that grow are filled where the model is to decode (see `fill`),
    with what the first `chunk` tokens left, and emptied before it reads on: reading 100k tokens with attention to all
    of them would take an hour. So below a layer that reads everything, attention begins anew with every chunk. States
    with a window are treated like those that grow.
    """

    def __init__(self, model: nn.Module, text: np.ndarray, chunk: int) -> None:
        """text: (n,) token ids; after the last the first comes again. chunk: tokens that are read at a time."""
        self.model, self.text, self.chunk = model, text, chunk
        self.tokens = 0  # read so far
        # At the model's precision, since what is appended to a quantised cache is what the layers computed.
        self.sample: Any = model.make_cache(precision="model")  # type: ignore[operator]
        self.cache: Any = model.make_cache()  # type: ignore[operator]
        self._forward(self.sample, chunk)

    def read(self, tokens: int) -> None:
        """Goes on until `tokens` tokens are read."""
        while self.tokens < tokens:
            count = min(self.chunk, tokens - self.tokens)
            if not all(isinstance(state, TokenState) for state in self.cache.parts()):
                self._forward(self.cache, count)
                self.empty()
            self.tokens += count

    def fill(self) -> None:
        """Gives the states that grow as many tokens as have been read."""
        for state, sample in zip(self.cache.parts(), self.sample.parts(), strict=True):
            if isinstance(state, TokenState):
                fill(state, sample, 1, self.tokens)

    def empty(self) -> None:
        """Empties the states that grow."""
        for state in self.cache.parts():
            if isinstance(state, TokenState):
                state.reset()

    def decode(self) -> None:
        """Reads one token, with all its logits."""
        self._forward(self.cache, 1)
        self.tokens += 1

    def _forward(self, cache: Any, count: int) -> None:
        ids = self.text[np.arange(self.tokens, self.tokens + count) % len(self.text)].astype(np.int64)
        device = next(self.model.parameters()).device
        self.model(torch.from_numpy(ids)[None].to(device), past_key_values=cache, logits_to_keep=1)


def fill(state: LayerState, sample: LayerState, rows: int, tokens: int) -> None:
    """Makes an empty state, itself no combination of several, one of `tokens` tokens in `rows` rows out of a sample,
    one that has read a few in one row.

    What a state keeps of single tokens is appended again and again. One of fixed size is taken as it is.
    """
    if isinstance(state, TokenState):
        state.update(*(repeated(tensor, rows, tokens) for tensor in sample.tensors().values()))
    else:
        state.replace({name: tensor.repeat_interleave(rows, dim=0) for name, tensor in sample.tensors().items()})
        state.seen = tokens


def repeated(tensor: Tensor, rows: int, tokens: int) -> Tensor:
    """(1, N, c, d) → (rows, N, tokens, d), the tokens over and over again."""
    return tensor.repeat(rows, 1, -(-tokens // tensor.shape[2]), 1)[:, :, :tokens]
