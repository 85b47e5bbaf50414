"""A token mixer of your own: every channel keeps a fading sum of what it has read."""

import torch
from torch import nn

from newllm.models.cache import RecurrentState
from newllm.models.layers import MLP, Layer, register_layer


@register_layer("my_layer")
class FadingSum(Layer):
    def __init__(self, hidden_size, num_heads, intermediate_size, fade=0.9):
        super().__init__()
        self.fade, self.norm = fade, nn.LayerNorm(hidden_size)
        self.value, self.gate = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(self, x, *, positions, mask, state):
        T, h = x.shape[1], self.norm(x)
        real = torch.ones_like(positions) if mask is None else mask[:, -T:].long()  # 0 for padding
        v = self.value(h) * real[..., None]
        t = real.cumsum(1).double()  # real tokens so far; bf16 cannot count beyond 256
        total = (self.fade ** (t[:, :, None] - t[:, None]).clamp(min=0)).tril().to(v.dtype) @ v  # (B, T, D)
        if state is not None:
            before = state.read("total")
            if before is not None:
                total = total + (self.fade**t).to(v.dtype)[..., None] * before[:, None]
            state.write(T, total=total[:, -1])
        return x + torch.sigmoid(self.gate(h)) * total + self.mlp(h)

    def make_state(self):
        return RecurrentState()
