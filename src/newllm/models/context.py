"""Language models with context vectors (SYSTEMS §7): the first New-LLM, mixes of context layers, and Context-Pythia."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from newllm.errors import UserError
from newllm.models.cache import LMCache
from newllm.models.config import LMConfig
from newllm.models.layers.context import ContextLayer
from newllm.models.linear import Linear
from newllm.models.options import check_count
from newllm.models.recurrent import RecurrentLM
from newllm.models.transformer import TransformerLM, register_architecture


class ContextVectorConfig(LMConfig):
    """Configuration of `ContextVectorLM`, which has no layers; hidden_size is the width E of its embeddings.

    Args:
        context_size: C numbers of the context. Default E.
        width: W of the MLP. Default 2 E.
        depth: its Linear maps, at least 1.
        dropout: probability with which a number of the MLP is left out in training.
        max_positions: learned positions; later tokens have the last one.
    """

    model_type = "newllm-context-vector"

    context_size: int | None = None
    width: int | None = None
    depth: int = 8
    dropout: float = 0.0
    max_positions: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        self.context_size = self.hidden_size if self.context_size is None else self.context_size
        self.width = 2 * self.hidden_size if self.width is None else self.width
        for name in ("context_size", "width", "depth", "max_positions"):
            check_count(name, getattr(self, name))
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout!r}: it must lie in [0, 1)")
        if self.tie_word_embeddings and self.width != self.hidden_size:
            raise UserError("tie_word_embeddings: embedding and head differ in width here; leave it out")
        super().__post_init__(**kwargs)


class PlainLinear(Linear):
    """A Linear with torch's initial values, uniform in ±1/√inputs: large enough for a row of them without LayerNorms
    to pass something on, and small enough for a sum over the whole text, which nothing bounds, not to explode."""


@register_architecture("context_vector")
class ContextVectorLM(RecurrentLM):
    """The first New-LLM: all it knows of the text before a token is one vector c, to which each token adds.

        h_t = MLP([embedding(x_t) + position(t); c_{t−1}]),   logits_t = W h_t,   c_t = c_{t−1} + U h_t + u,   c_0 = 0

    The MLP is `depth` times Linear, ReLU, dropout, without residual or normalisation.
    """

    config_class = ContextVectorConfig
    state_learns_from_later_tokens = True

    def __init__(self, config: ContextVectorConfig) -> None:
        super().__init__(config)
        E, C, W = config.hidden_size, config.context_size, config.width
        assert C is not None
        assert W is not None
        self.positions = nn.Embedding(config.max_positions, E)
        # The first Linear, in two parts: what the text gives it does not wait for the context.
        self.read_text = PlainLinear(E, W)
        self.read_context = PlainLinear(C, W, bias=False)
        self.deeper = nn.ModuleList(PlainLinear(W, W) for _ in range(config.depth - 1))
        self.dropout = nn.Dropout(config.dropout)
        self.move = PlainLinear(W, C)
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.head = Linear(W, config.vocab_size, bias=False)
        self.post_init()  # initialises what has come since TransformerLM did

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PlainLinear):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)  # no LayerNorm makes up for small ones

    @property
    def state_size(self) -> int:
        return self.config.context_size

    def no_states(self, input_ids: Tensor) -> Tensor:
        # In float32 at least: in bf16 a sum over many tokens would soon take up nothing more.
        return super().no_states(input_ids).to(torch.promote_types(self.dtype, torch.float32))

    def state_bytes(self, tokens: int, element_size: int) -> list[int]:
        return [self.state_size * max(element_size, 4)]

    def iterate(
        self,
        input_ids: Tensor,
        lagged: Tensor,
        *,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        hidden = self._think(self._given(input_ids, positions), lagged)
        return hidden, lagged + self.move(hidden)

    def recur(self, input_ids: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """The loop over time leaves out what the text gives, and the head."""
        kept, state = self.fed_back(input_ids, cache)
        T, hidden = input_ids.shape[1], []
        real = None if mask is None else mask[:, -T:, None]
        for t, given in enumerate(self._given(input_ids, positions).unbind(1)):
            hidden.append(self._think(given, state))
            moved = state + self.move(hidden[-1])
            state = moved if real is None else torch.where(real[:, t], moved, state)
        kept.write(T, state=state)
        return torch.stack(hidden, dim=1)

    def _given(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """What the first Linear makes of the tokens (B, T) at these positions: (B, T, W)."""
        places = self.positions(positions.clamp(max=self.config.max_positions - 1))
        return self.read_text(self.embed(input_ids) + places)

    def _think(self, given: Tensor, context: Tensor) -> Tensor:
        """The MLP: h (…, W) from what the text gives (…, W) and the context before it (…, C)."""
        h = self.dropout(F.relu(given + self.read_context(context.to(given.dtype))))
        for linear in self.deeper:
            h = self.dropout(F.relu(linear(h)))
        return h


class ContextConfig(LMConfig):
    """Configuration of `ContextLM`: that of its layers."""

    model_type = "newllm-context"


@register_architecture("context")
class ContextLM(RecurrentLM):
    """Context layers, and any others, as a recurrent model.

    The states fed back are those of the layers whose recurrence is not linear, one after the other; with linear ones
    alone it is a TransformerLM. True recurrence is the layers' own: each in turn goes through all tokens. So what is
    fed back stands in the layers' states, and in the cache nothing more.
    """

    config_class = ContextConfig

    @property
    def state_size(self) -> int:
        return sum(self._lagged_sizes())

    def _lagged_sizes(self) -> list[int]:
        return [getattr(layer, "lagged_size", 0) for layer in self.layers]

    def make_cache(self, precision: str | None = None) -> LMCache:
        return TransformerLM.make_cache(self, precision)

    def state_bytes(self, tokens: int, element_size: int) -> list[int]:
        return TransformerLM.state_bytes(self, tokens, element_size)

    def iterate(
        self,
        input_ids: Tensor,
        lagged: Tensor,
        *,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, sizes, new = self.embed(input_ids), self._lagged_sizes(), []
        states = [None] * len(self.layers) if cache is None else cache.layers
        for layer, state, own in zip(self.layers, states, lagged.split(sizes, dim=-1), strict=True):
            x, contexts = _iterate_layer(layer, x, own, positions=positions, mask=mask, state=state)
            new.append(contexts)
        return self.norm(x), torch.cat(new, dim=-1)

    def recur(self, input_ids: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        x = self.run_layers(self.embed(input_ids), positions=positions, mask=mask, states=cache.layers)
        return self.norm(x)


def _iterate_layer(layer: nn.Module, x: Tensor, lagged: Tensor, **places: Any) -> tuple[Tensor, Tensor]:
    """A layer's output, and its states (B, T, N) where it has lagged ones (B, T, N); else N = 0, and they are these."""
    return layer.iterate(x, lagged, **places) if lagged.shape[-1] else (layer(x, **places), lagged)  # type: ignore[operator]


class ContextPythiaConfig(LMConfig):
    """Configuration of `ContextPythiaLM`.

    Args:
        context_size: S, numbers of a context vector. Default hidden_size.
        num_contexts, gates, time_scales: as of `ContextLayer`.
    """

    model_type = "newllm-context-pythia"

    context_size: int | None = None
    num_contexts: int = 1
    gates: str = "update"
    time_scales: dict[str, float] | None = None


@register_architecture("context_pythia")
class ContextPythiaLM(RecurrentLM):
    """Layers of any type whose input tells of the text so far: e_t + W_o (SiLU(o_t) ⊙ LayerNorm(c_t)).

    c_t = f(c_{t−1}, LayerNorm(e_t)) is the context of a cell before the layers, which all of them see through the
    residual stream: a `ContextLayer` without MLP and convolution.
    """

    config_class = ContextPythiaConfig

    def __init__(self, config: ContextPythiaConfig) -> None:
        super().__init__(config)
        self.context = ContextLayer(
            config.hidden_size,
            num_heads=1,
            intermediate_size=0,
            context_size=config.context_size,
            num_contexts=config.num_contexts,
            gates=config.gates,
            time_scales=config.time_scales,
            conv_size=1,
            mlp=False,
        )
        self.post_init()  # initialises what has come since TransformerLM did

    @property
    def state_size(self) -> int:
        return self.context.lagged_size

    def make_cache(self, precision: str | None = None) -> LMCache:
        cache = TransformerLM.make_cache(self, precision)
        cache.layers.append(self.context.make_state())
        return cache

    def state_bytes(self, tokens: int, element_size: int) -> list[int]:
        return [*TransformerLM.state_bytes(self, tokens, element_size), self.context.state_bytes(tokens, element_size)]

    def iterate(
        self,
        input_ids: Tensor,
        lagged: Tensor,
        *,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        own, states = (None, None) if cache is None else (cache.layers[-1], cache.layers[:-1])
        x, contexts = _iterate_layer(
            self.context, self.embed(input_ids), lagged, positions=positions, mask=mask, state=own
        )
        return self.norm(super().run_layers(x, positions=positions, mask=mask, states=states)), contexts

    def next_states(
        self, input_ids: Tensor, lagged: Tensor, *, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """As the general one, without the layers, which have no part in it."""
        x = self.embed(input_ids)
        return _iterate_layer(self.context, x, lagged, positions=positions, mask=mask, state=None)[1]

    def recur(self, input_ids: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """The loop over time is the cell's alone; the layers then read all T tokens at once."""
        x = self.run_layers(self.embed(input_ids), positions=positions, mask=mask, states=cache.layers)
        return self.norm(x)

    def run_layers(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, states: Sequence[Any] | None) -> Tensor:
        """The cell, by its own recurrence, and all layers; the cell's state is the last."""
        own, others = (None, None) if states is None else (states[-1], states[:-1])
        x = self.context(x, positions=positions, mask=mask, state=own)
        return super().run_layers(x, positions=positions, mask=mask, states=others)
