"""A coarse memory over several fine ones: a gate decides how much of the fine reading a query needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from newllm.models.layers.base import register_layer
from newllm.models.layers.multi_memory import MultiMemoryLayer
from newllm.ops import reference
from newllm.ops.memory import Found


class FineGate(nn.Module):
    """γ = sigmoid(w_h·a + b_h), where a is what head h read from the coarse memory.

    A module of its own, so that it can be watched, or closed, by a hook.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, coarse: Tensor) -> Tensor:
        """coarse (B, Hm, …, d) to γ (B, Hm, …, 1)."""
        flat = coarse.flatten(2, -2)
        opened = flat @ self.weight.to(flat.dtype)[..., None] + self.bias.to(flat.dtype)[:, None, None]
        return opened.sigmoid().view(*coarse.shape[:-1], 1)


@register_layer("hierarchical")
class HierarchicalLayer(MultiMemoryLayer):
    """`MultiMemoryLayer`, whose memories are the fine ones, with a coarse memory: their sum, which costs no state.

    The coarse read is σ(q) ΣM / (σ(q)·Σz). A gate γ on it, for each query and head, decides what is taken of the fine
    read: (1 − γ) · coarse + γ · fine.

    Args:
        num_memories: N, of the fine ones.
        segment_length, local, position, memory_head_dim, use_delta_rule, memory_grad, key_shift: as of `InfiniLayer`.
    """

    def _make_mixer(self) -> None:
        self.fine_gate = FineGate(self.num_memory_heads, self.memory_head_dim)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.fine_gate.weight)
        nn.init.zeros_(self.fine_gate.bias)  # γ = 1/2

    def gate_parameters(self) -> list[nn.Parameter]:
        return [*super().gate_parameters(), self.fine_gate.bias]

    def mix(self, q: Tensor, found: Found) -> Tensor:
        fine = super().mix(q, found)
        # Σ σ(q) M_n / Σ σ(q)·z_n, from what was read of each: σ(q) M_n = mass_n · read_n.
        mass = found.mass.sum(dim=1)
        coarse = (found.mass.unsqueeze(-1) * found.reads).sum(dim=1) / mass.masked_fill(mass == 0, 1).unsqueeze(-1)
        return coarse + self.fine_gate(coarse) * (fine - coarse)

    def reference_mix(self, q: Tensor, known: list[tuple[Tensor, Tensor]], h: int) -> Tensor:
        fine = super().reference_mix(q, known, h)
        coarse = reference.read_memory(q, sum(M for M, _ in known), sum(z for _, z in known))  # type: ignore[arg-type]
        opened = (coarse @ self.fine_gate.weight[h] + self.fine_gate.bias[h]).sigmoid()
        return (1 - opened) * coarse + opened * fine
