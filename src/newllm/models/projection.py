"""Diverse projection (DProj): the text so far in one narrow vector a token, which takes the embedding's place.

    p_t = LayerNorm(p_{t−1} + GELU(W_p p_{t−1} + W_e e_t + b))

e_t is the token's embedding after a LayerNorm, D numbers; p_t has P < D. The cell is trained without labels, first and
alone (`training/projection.py`), so that projections differ from one another (OACD, below), and is then frozen. The
layers read p_t and are P wide: so are their keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from newllm.errors import UserError, nearest
from newllm.models.config import LMConfig
from newllm.models.layers.v_dproj import head_size
from newllm.models.recurrent import RecurrentLM
from newllm.models.transformer import register_architecture

CELLS = ("diverse", "random", "learned")
WEIGHT_STD, BIAS_STD = 0.1, 0.01  # initial values of the cell, part of its definition


class DiverseProjection(nn.Module):
    """The cell. W = [W_p W_e] acts on [p_{t−1}; e_t].

    Its LayerNorm has no gain and no bias: OACD rewards long vectors, and a gain that grows keeps the projections from
    ever converging.
    """

    def __init__(self, embedding_size: int, projection_size: int) -> None:
        super().__init__()
        self.recurrent = nn.Parameter(torch.empty(projection_size, projection_size))  # W_p
        self.inputs = nn.Parameter(torch.empty(projection_size, embedding_size))  # W_e
        self.bias = nn.Parameter(torch.empty(projection_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.recurrent, std=WEIGHT_STD)
        nn.init.normal_(self.inputs, std=WEIGHT_STD)
        nn.init.normal_(self.bias, std=BIAS_STD)

    def drive(self, embedded: Tensor) -> Tensor:
        """W_e e + b of e (…, D): (…, P). It has no part in the recurrence, and is taken of all tokens at once."""
        return F.linear(embedded, self.inputs, self.bias)

    def forward(self, before: Tensor, drive: Tensor) -> Tensor:
        """p_t (…, P) of p_{t−1} (…, P), zeros where nothing was read yet, and the token's drive (…, P)."""
        moved = before + F.gelu(drive + F.linear(before, self.recurrent))
        return F.layer_norm(moved, moved.shape[-1:])


def oacd_loss(projections: Tensor, mean_weight: float) -> Tensor:
    """−‖P − mean(P)‖_F / N + mean_weight · ‖mean(P)‖² of N projections (N, P): far from their mean, which is near zero.

    Where all have the same length, as after a LayerNorm, both terms say the same: the mean is to vanish.
    """
    mean = projections.mean(dim=0)
    return mean_weight * mean.square().sum() - torch.linalg.matrix_norm(projections - mean) / len(projections)


def effective_rank(projections: Tensor) -> float:
    """exp of the entropy of the singular values of (N, P), taken as shares of their sum (Roy and Vetterli 2007).

    From 1, where all are multiples of one vector, to P, where all directions are used alike.
    """
    values = torch.linalg.svdvals(projections.double())
    return float(torch.special.entr(values / values.sum()).sum().exp())


class DProjConfig(LMConfig):
    """Configuration of `DProjLM`: that of its layers, P wide, with an embedding of another width.

    Args:
        embedding_size: D. None, as in a new configuration, takes hidden_size and the layers' width for D; both are then
            set to P. A saved configuration has it, with P for hidden_size and projection_size.
        projection_size: P: a multiple of num_heads, or a share of D, rounded to one.
        cell: 'diverse', trained first with OACD and then frozen; or, to compare with, 'random', frozen as initialised,
            and 'learned', trained by the language model's loss like all else.
    """

    model_type = "newllm-dproj"

    embedding_size: int | None = None
    projection_size: int | float = 0.625
    cell: str = "diverse"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.cell not in CELLS:
            raise nearest(str(self.cell), list(CELLS), "cell", "of model 'dproj'")
        if self.tie_word_embeddings:
            raise UserError("tie_word_embeddings: embedding and head of a dproj model differ in width; leave it out")
        if self.embedding_size is None:
            heads = self.layer_specs[0]["num_heads"] if self.layer_specs else 1
            size = heads * head_size("projection_size", self.projection_size, self.hidden_size, heads)
            self.embedding_size, self.hidden_size, self.projection_size = self.hidden_size, size, size
            self.layer_specs = [spec | {"hidden_size": size} for spec in self.layer_specs]
        elif self.projection_size != self.hidden_size or type(self.embedding_size) is not int:
            raise UserError(
                f"embedding_size is {self.embedding_size!r}: the embedding of a dproj model is hidden_size wide; leave "
                "it out, and set projection_size alone"
            )
        super().__post_init__(**kwargs)


@register_architecture("dproj")
class DProjLM(RecurrentLM):
    """Embedding, LayerNorm, DiverseProjection, layers of its width, final LayerNorm, head. The state fed back is p."""

    config_class = DProjConfig

    def __init__(self, config: DProjConfig) -> None:
        super().__init__(config)
        assert config.embedding_size is not None
        self.embed = nn.Embedding(config.vocab_size, config.embedding_size)
        self.norm_embedding = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.cell = DiverseProjection(config.embedding_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DiverseProjection):
            module.reset_parameters()

    def frozen_parameters(self) -> list[nn.Parameter]:
        own = [] if self.config.cell == "learned" else self.cell.parameters()
        return [*super().frozen_parameters(), *own]

    @property
    def state_size(self) -> int:
        return self.config.hidden_size

    def drive(self, input_ids: Tensor) -> Tensor:
        """What the tokens (…) bring into the recurrence, whatever came before them: (…, P)."""
        return self.cell.drive(self.norm_embedding(self.embed(input_ids)))

    def iterate(
        self,
        input_ids: Tensor,
        lagged: Tensor,
        *,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        projections = self.cell(lagged, self.drive(input_ids))  # (B, T, P)
        return self._read(projections, positions, mask, cache), projections

    def next_states(
        self, input_ids: Tensor, lagged: Tensor, *, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """As the general one, without the layers, which have no part in it."""
        return self.cell(lagged, self.drive(input_ids))

    def recur(self, input_ids: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """The loop over time is the cell's alone; the layers then read all T tokens at once."""
        kept, state = self.fed_back(input_ids, cache)
        T = input_ids.shape[1]
        projections, state = self.project(input_ids, state, None if mask is None else mask[:, -T:])
        kept.write(T, state=state)
        return self._read(projections, positions, mask, cache)

    def project(
        self, input_ids: Tensor, state: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Projections of all tokens by true recurrence.

        Args:
            input_ids: (B, T).
            state: (B, P), the projection after the token before; None at the beginning of a text.
            mask: (B, T) bool, False for padding, which leaves the state as it is.

        Returns:
            (B, T, P), and the state (B, P) after the last token.
        """
        state = self.no_states(input_ids[:, :1])[:, 0] if state is None else state
        projections = []
        for t, drive in enumerate(self.drive(input_ids).unbind(1)):  # the gradient of [:, t] would be T − 1 zeros, too
            projections.append(self.cell(state, drive))
            state = projections[-1] if mask is None else torch.where(mask[:, t : t + 1], projections[-1], state)
        return torch.stack(projections, dim=1), state

    def _read(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Layers and last LayerNorm over projections x (B, T, P)."""
        states = None if cache is None else cache.layers[:-1]
        return self.norm(self.run_layers(x, positions=positions, mask=mask, states=states))
