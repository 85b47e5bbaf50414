"""The linear map of every layer: nn.Linear, and while decoding on a CPU a packed copy of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from newllm.ops.linear import pack, packed_linear, worth_packing


class Linear(nn.Linear):
    """nn.Linear; products of a few rows without gradient go through a packed copy of the weight (`ops/linear.py`).

    The copy is made once, at the first such product, and again when the weight has changed; it doubles the memory of
    the weights while a model decodes, is part of no state_dict, and is dropped by `train()`, `eval()` and by any
    product with gradient. A change that autograd does not count (through `weight.data`) is seen only after those.
    """

    _packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if worth_packing(x, self.weight):
            return packed_linear(x, self._packed_weight(), self.bias)
        if self._packed is not None and torch.is_grad_enabled():
            self._packed = None  # training may follow, and fused optimizers change weights without counting it
        return F.linear(x, self.weight, self.bias)

    def _packed_weight(self) -> Tensor:
        weight = self.weight
        key = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, pack(weight))
        return self._packed[1]

    def train(self, mode: bool = True) -> Linear:
        self._packed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the packed weight."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
