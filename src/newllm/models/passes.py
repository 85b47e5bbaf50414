"""Several passes through the same layers: h₁ → projection → the same layers → h₂ → … → head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from newllm.errors import UserError
from newllm.models.cache import LMCache
from newllm.models.linear import Linear
from newllm.models.transformer import TransformerLM


class Projection(Linear):
    """From what the layers made back to what they read: W · LayerNorm(h), (…, D) to (…, D).

    h, which goes into the final LayerNorm, is a sum over all layers and of no particular scale: it is normalised here
    too. No bias and no learned norm: zeros stay zeros, so that a state of zeros is none. W begins so small that its
    output has the standard deviation of an embedding: the layers begin with what they know.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        # In the dtype of h: the residual stream stays float32 under autocast.
        return super().forward(normalised(h)).to(h.dtype)


def normalised(h: Tensor) -> Tensor:
    """(h − mean) / standard deviation over the last dimension; zeros stay zeros."""
    return F.layer_norm(h, h.shape[-1:])


class ManyPassesLM(TransformerLM):
    """A TransformerLM whose layers can be gone through several times. A subclass gives `num_passes`.

    Every pass attends over the earlier tokens as that pass left them: it has keys and values of its own. So the cache
    holds the states of all layers for each pass, pass by pass.
    """

    extra_proj: Projection

    @property
    def num_passes(self) -> int:
        """At least 1."""
        raise NotImplementedError

    def read_again(self, h: Tensor) -> Tensor:
        """What the next pass reads of what a pass has made, both (B, T, D)."""
        return self.extra_proj(h)

    def run_passes(
        self, x: Tensor, count: int, *, positions: Tensor, mask: Tensor | None, states: Sequence[Any] | None
    ) -> list[Tensor]:
        """h₁ … h_count, each (B, T, D) before the final LayerNorm; h_{p+1} = layers(read_again(h_p)).

        Args:
            x: (B, T, D), what the first pass reads.
            states: those of all passes, which the passes advance, or None. Further arguments as of `Layer.forward`.
        """
        L = len(self.layers)
        results: list[Tensor] = []
        for p in range(count):
            own = None if states is None else states[p * L : (p + 1) * L]
            x = self.read_again(results[-1]) if results else x
            results.append(super().run_layers(x, positions=positions, mask=mask, states=own))
        return results

    def make_cache(self, precision: str | None = None) -> LMCache:
        cache = super().make_cache(precision)
        L = len(self.layers)
        further = [layer.make_state() for _ in range(self.num_passes - 1) for layer in self.layers]  # type: ignore[operator]
        cache.layers[L:L] = LMCache(further, cache.layers[0].precision).layers
        return cache

    def state_bytes(self, tokens: int, element_size: int) -> list[int]:
        L = len(self.layers)
        own = super().state_bytes(tokens, element_size)
        return own[:L] * self.num_passes + own[L:]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projection):
            # Through torch.nn.init, which spares loaded weights.
            nn.init.normal_(module.weight, std=self.config.std_of_embeddings / module.in_features**0.5)

    def _check_can_hold(self) -> None:
        if self.num_passes > 1:
            raise UserError(
                "every pass of this model has memories of its own, and only those of the first would be kept between "
                "calls; use a model of one pass"
            )
