"""ContextLayer: in place of attention, context vectors that every token moves on (SYSTEMS §7)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from newllm.errors import UserError
from newllm.models.cache import RecurrentState
from newllm.models.context_cell import SCALES, ContextCell, scales_of
from newllm.models.layers.base import MLP, Layer, register_layer
from newllm.models.linear import Linear
from newllm.models.options import check_count, check_switch


@register_layer("context")
class ContextLayer(Layer):
    """y = x + W_o (SiLU(o) ⊙ LayerNorm(Σ_k u_k c_k)), then y + mlp(ln2 y): a recurrence where attention would be.

    The K contexts c_t = f(c_{t−1}, h_t), see `ContextCell`, read h = conv(ln1 x), in which every channel is a learned
    mixture of the last few tokens. What they hold is used by weights u_t, one for each context and head, and through
    the output gate o_t, both linear in h_t. State: K·S numbers, and the tokens that the convolution still needs,
    however long the text.

    Args:
        hidden_size: D, the width of the residual stream.
        num_heads: H, parts of a context with weights of their own.
        intermediate_size: width of the MLP.
        context_size: S, numbers of a context: a multiple of H. Default D: as many parameters as attention has.
        num_contexts: K.
        gates: 'none', 'update', 'update_forget' or 'input'. With 'input' the recurrence is linear: training and
            prefill are parallel over the text. The others go token by token; in a ContextLM they can be trained in
            parallel too (`models/context.py`).
        time_scales: {'short': …, 'long': …} in tokens: rates of decay begin spread between the two; None: all alike.
        conv_size: tokens that the convolution mixes, the newest included; 1 for no convolution.
        mlp: False leaves the MLP out.
        own_rate: rates of decay β and convolution learn at `gate_lr` instead of the model's rate, at which they hardly
            move.
    """

    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"num_contexts": 3, "context_size": 40},
        {"conv_size": 1, "time_scales": None},
        {"gates": "none", "time_scales": None, "conv_size": 1},
        {"gates": "none", "num_contexts": 2, "context_size": 20, "time_scales": {"short": 1.5, "long": 30}},
        {"gates": "update", "num_contexts": 3, "context_size": 24, "conv_size": 3, "mlp": False},
        {"gates": "update_forget", "num_contexts": 2, "context_size": 20, "time_scales": None, "conv_size": 2},
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        context_size: int | None = None,
        num_contexts: int = 1,
        gates: str = "input",
        time_scales: dict[str, float] | None = SCALES,
        conv_size: int = 4,
        mlp: bool = True,
        own_rate: bool = False,
    ) -> None:
        super().__init__()
        check_count("conv_size", conv_size)
        check_switch("mlp", mlp)
        check_switch("own_rate", own_rate)
        size = hidden_size if context_size is None else context_size
        time_scales = scales_of(time_scales)
        self.cell = ContextCell(hidden_size, num_heads, size, num_contexts, gates, time_scales)
        self._arguments |= {"context_size": size, "time_scales": time_scales}
        self.hidden_size, self.num_heads, self.context_size = hidden_size, num_heads, size
        self.num_contexts, self.conv_size = num_contexts, conv_size
        self.norm_mixer = nn.LayerNorm(hidden_size)
        if conv_size > 1:
            self.taps = nn.Parameter(self._first_taps())
        if num_contexts > 1:
            self.use = Linear(hidden_size, num_contexts * num_heads)
        self.gate = Linear(hidden_size, size)
        self.norm_contexts = nn.LayerNorm(size)
        self.out = Linear(size, hidden_size)
        if mlp:
            self.norm_mlp = nn.LayerNorm(hidden_size)
            self.mlp = MLP(hidden_size, intermediate_size)
        self.has_mlp, self.own_rate = mlp, own_rate
        if own_rate and not self._vectors():
            raise UserError("own_rate is for rates of decay and a convolution: this layer has neither, leave it out")

    def _first_taps(self) -> Tensor:
        """Those of every channel, oldest token first: as if there were no convolution. A vector: no weight decay."""
        return F.pad(torch.ones(1, self.hidden_size), (0, 0, self.conv_size - 1, 0)).flatten()

    def reset_parameters(self) -> None:
        self.cell.reset_parameters()
        if self.conv_size > 1:
            initialization.copy_(self.taps, self._first_taps())
        if self.num_contexts > 1:
            first = torch.arange(self.num_contexts) == 0  # a token begins with the first, and learns to use the others
            initialization.copy_(self.use.bias, first.repeat_interleave(self.num_heads).to(self.use.bias.dtype))

    def _vectors(self) -> list[nn.Parameter]:
        """Rates of decay and convolution, where there are such: one number for each channel, which no matrix makes up
        for."""
        own = [getattr(self.cell, "rates", None), getattr(self, "taps", None)]
        return [vector for vector in own if vector is not None]

    def gate_parameters(self) -> list[nn.Parameter]:
        return self._vectors() if self.own_rate else []

    def forward(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, state: RecurrentState | None) -> Tensor:  # type: ignore[override]
        real = None if mask is None else mask[:, mask.shape[1] - x.shape[1] :]
        h = self._convolved(x, real, state)
        contexts = self.cell(h, real, None if state is None else state.read("contexts"))
        if state is not None:
            state.write(x.shape[1], contexts=contexts[:, -1])
        return self._finish(x, h, contexts)

    @property
    def lagged_size(self) -> int:
        """Numbers N of the state that the layer feeds back to itself in a way that is not linear; else 0."""
        return 0 if self.cell.is_linear else self.num_contexts * self.context_size

    def iterate(
        self, x: Tensor, lagged: Tensor, *, positions: Tensor, mask: Tensor | None, state: RecurrentState | None
    ) -> tuple[Tensor, Tensor]:
        """All tokens in parallel, from contexts of an earlier iteration; for layers with a lagged_size N.

        Args:
            lagged: (B, T, N), at token t the contexts after the real token before it; zeros at the first one.
            Others as of `forward`.

        Returns:
            (B, T, D); states (B, T, N), at token t the contexts after it, which padding leaves as they are.
        """
        real = None if mask is None else mask[:, mask.shape[1] - x.shape[1] :]
        h = self._convolved(x, real, state)
        lagged = lagged.unflatten(-1, (self.num_contexts, self.context_size))
        contexts = self.cell.iterate(h, lagged)
        if real is not None:
            contexts = torch.where(real[..., None, None], contexts, lagged)
        if state is not None:
            state.write(x.shape[1], contexts=contexts[:, -1])
        return self._finish(x, h, contexts), contexts.flatten(2)

    def _convolved(self, x: Tensor, real: Tensor | None, state: RecurrentState | None) -> Tensor:
        """conv(ln1 x) (B, T, D) over the real tokens; moves on those that the state keeps for it. Before the text stand
        zeros."""
        h = self.norm_mixer(x)
        if self.conv_size == 1:
            return h
        T, kept = h.shape[1], self.conv_size - 1
        before = None if state is None else state.read("recent")
        longer = F.pad(h, (0, 0, kept, 0)) if before is None else torch.cat([before, h], dim=1)
        if real is not None:
            # Padding to the front: then nothing stands between real tokens.
            order = F.pad(real, (kept, 0), value=True).int().argsort(dim=1, stable=True)
            longer = longer.take_along_dim(order[..., None], dim=1)
        if state is not None:
            state.write(0, recent=longer[:, T:])
        taps = self.taps.view(self.conv_size, -1)
        mixed: Tensor = sum(taps[n] * longer[:, n : n + T] for n in range(self.conv_size))  # type: ignore[assignment]
        if real is None:
            return mixed
        places = order.argsort(dim=1)[:, kept:] - kept  # negative for padding alone
        return mixed.take_along_dim(places.clamp(min=0)[..., None], dim=1)

    def _finish(self, x: Tensor, h: Tensor, contexts: Tensor) -> Tensor:
        """The layer's output (B, T, D) from what the contexts (B, T, K, S) hold."""
        if self.num_contexts > 1:
            weights = self.use(h).unflatten(-1, (self.num_contexts, self.num_heads, 1))
            read = (contexts.unflatten(-1, (self.num_heads, -1)) * weights).sum(dim=2).flatten(2)
        else:
            read = contexts[:, :, 0]
        x = x + self.out(F.silu(self.gate(h)) * self.norm_contexts(read.to(x.dtype)))
        return x + self.mlp(self.norm_mlp(x)) if self.has_mlp else x

    def make_state(self) -> RecurrentState:
        return RecurrentState()

    def state_bytes(self, tokens: int, element_size: int) -> int:
        recent = (self.conv_size - 1) * self.hidden_size * element_size
        return self.num_contexts * self.context_size * max(element_size, 4) + recent

    def reference(self, x: Tensor, *, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Row by row, token by token, context by context, over the real tokens alone."""
        mixed = torch.zeros_like(x)
        for b in range(len(x)):
            real = torch.arange(x.shape[1], device=x.device) if mask is None else mask[b].nonzero()[:, 0]
            mixed = mixed.index_put((torch.tensor(b, device=x.device), real), self._reference_row(x[b, real]))
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x)) if self.has_mlp else x

    def _reference_row(self, x: Tensor) -> Tensor:
        """What is added to the residual stream (T, D) of one row without padding."""
        K, S, H = self.num_contexts, self.context_size, self.num_heads
        normed = self.norm_mixer(x)
        taps = self.taps.view(self.conv_size, -1) if self.conv_size > 1 else torch.ones_like(normed[:1])
        contexts, outputs = [x.new_zeros(S) for _ in range(K)], []
        for t in range(len(x)):
            h = sum(taps[-1 - n] * normed[t - n] for n in range(min(len(taps), t + 1)))
            contexts = self.cell.reference(h, contexts)
            weights = self.use(h).view(K, H).repeat_interleave(S // H, dim=1) if K > 1 else h.new_ones(1, S)
            read = self.norm_contexts(sum(w * c for w, c in zip(weights, contexts, strict=True)))
            gate = self.gate(h)
            outputs.append(self.out(gate * gate.sigmoid() * read))
        return torch.stack(outputs)
