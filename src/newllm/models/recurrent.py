"""RecurrentLM: language models whose states feed themselves, and the one interface by which all of them are trained.

What such a model reads at token t depends on a state of its own after token t − 1, of N numbers. So the truth about it
is token by token: `forward`, `generate` and every perplexity follow this *true recurrence*. Training need not
(`training/lagged_cache.py`): `iterate` computes all tokens in parallel from the states of an earlier iteration, moved
on by one token, and its fixed point is the true recurrence. T iterations always reach it, since each makes one more
token's state exact.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from newllm.errors import UserError
from newllm.models.cache import LMCache, RecurrentState
from newllm.models.transformer import TransformerLM


class RecurrentLM(TransformerLM):
    """A TransformerLM with a state that is fed back. A subclass gives `state_size` and `iterate`.

    Its cache holds the states of the layers and, last, the state after the newest token.
    """

    state_learns_from_later_tokens: ClassVar[bool] = False
    """Whether a state is read by later tokens alone, and by nothing in the pass that makes it. What makes it has no
    gradient but through it, and learns by Lagged Cache Training only if two passes or more carry gradient."""

    def iterate(
        self,
        input_ids: Tensor,
        lagged: Tensor,
        *,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One parallel pass over T tokens.

        Args:
            input_ids: (B, T).
            lagged: (B, T, N), at token t the state after the real token before it; zeros at each row's first one.
            positions: (B, T), counted from 0 at each row's first real token.
            mask: (B, S) bool over all tokens the cache has read, these T last; False for padding.
            cache: advanced by this call, except for the fed-back state.

        Returns:
            hidden (B, T, D) after the last LayerNorm, as the head reads it; states (B, T, N), at token t the state
            after it. Token t of both depends on tokens ≤ t and lagged[:, ≤ t] alone.
        """
        raise NotImplementedError

    def next_states(
        self, input_ids: Tensor, lagged: Tensor, *, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The states of `iterate` alone, (B, T, N): a pass after which comes another. Args as of `iterate`.

        For a model to override in which some layers have no part in the states.
        """
        return self.iterate(input_ids, lagged, positions=positions, mask=mask)[1]

    def first_states(self, input_ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, N): states to begin iterating from, by a *discrete* pass: nothing is fed back, every token sees zeros.

        Args as of `iterate`.
        """
        return self.next_states(input_ids, self.no_states(input_ids), positions=positions, mask=mask)

    def no_states(self, input_ids: Tensor) -> Tensor:
        """(B, T, N) zeros, in the dtype in which the state is kept."""
        return torch.zeros(*input_ids.shape, self.state_size, dtype=self.dtype, device=input_ids.device)

    def fed_back(self, input_ids: Tensor, cache: Cache) -> tuple[RecurrentState, Tensor]:
        """Where a cache keeps what is fed back, and the state (B, N) that the next of tokens (B, T) is given."""
        kept = cache.layers[-1]
        assert isinstance(kept, RecurrentState)
        state = kept.read("state")
        return kept, self.no_states(input_ids[:, :1])[:, 0] if state is None else state

    def make_cache(self, precision: str | None = None) -> LMCache:
        cache = super().make_cache(precision)
        if self.state_size:
            cache.layers.append(RecurrentState())
        return cache

    def state_bytes(self, tokens: int, element_size: int) -> list[int]:
        own = [self.state_size * element_size] if self.state_size else []
        return super().state_bytes(tokens, element_size) + own

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """By true recurrence, token by token: (B, T, D). In training, gradients go back through all tokens."""
        if input_ids is None or inputs_embeds is not None:
            raise UserError("a recurrent model reads input_ids, of which its states are made: give no inputs_embeds")
        if input_ids.shape[1] == 0:
            return torch.zeros(*input_ids.shape, self.head.in_features, dtype=self.dtype, device=input_ids.device)
        positions, mask = self._places(input_ids, attention_mask, position_ids, past_key_values)
        if not self.state_size:
            cache = past_key_values if past_key_values is not None or self._reads_without_cache() else self.make_cache()
            return self.iterate(input_ids, self.no_states(input_ids), positions=positions, mask=mask, cache=cache)[0]
        cache = self.make_cache("model" if self.training else None) if past_key_values is None else past_key_values
        return self.recur(input_ids, positions=positions, mask=mask, cache=cache)

    def recur(self, input_ids: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """True recurrence over T tokens through a cache; hidden (B, T, D). Args as of `iterate`.

        The general form, for any `iterate`; a model that can leave its layers out of the loop has one of its own.
        """
        kept, state = self.fed_back(input_ids, cache)
        T, hidden = input_ids.shape[1], []
        for t in range(T):
            now = slice(t, t + 1)
            seen = None if mask is None else mask[:, : mask.shape[1] - T + t + 1]
            h, states = self.iterate(
                input_ids[:, now], state[:, None], positions=positions[:, now], mask=seen, cache=cache
            )
            hidden.append(h)
            # Padding leaves the state as it is.
            state = states[:, 0] if seen is None else torch.where(seen[:, -1:], states[:, 0], state)
        kept.write(T, state=state)
        return torch.cat(hidden, dim=1)


def lag(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """States after each token as what the next one is given: (B, T, N) moved on by one token, zeros first.

    Args:
        states: (B, T, N).
        mask: (B, T) bool, False for padding, after which the next token is given the state before it.
    """
    if mask is not None:
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, places, -1).cummax(dim=1).values  # the last real token up to each
        states = states.take_along_dim(last.clamp(min=0)[..., None], dim=1).masked_fill((last < 0)[..., None], 0)
    return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
