"""The linear map of every layer: nn.Linear, and while decoding on a CPU a packed copy of its weight."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from newllm.ops.linear import pack, packed_linear, worth_packing

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change weights without raising their version.
register_optimizer_step_post_hook(_count_step)


class Packed(NamedTuple):
    """A packed weight, and what tells whether it still is the weight's."""

    weight: Tensor
    """The weight it was made of, detached: held, so that no other weight can come to stand at its address."""
    version: int
    optimizer_steps: int
    packed: Tensor

    def is_of(self, weight: Tensor) -> bool:
        unchanged = self.version == weight._version and self.optimizer_steps == _optimizer_steps
        return unchanged and self.weight.data_ptr() == weight.data_ptr()


class Linear(nn.Linear):
    """nn.Linear; products of a few rows without gradient go through a packed copy of the weight (`ops/linear.py`).

    The copy is made at the first such product, and again when the weight is another or has changed, in place or by an
    optimizer. It doubles the memory of the weights while a model decodes and is part of no state_dict. Only a change
    that torch does not count, one through `weight.data`, has to be followed by `train()` or `eval()`, which drop it.
    """

    _packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        if worth_packing(x, self.weight):
            return packed_linear(x, self._packed_weight(), self.bias)
        return F.linear(x, self.weight, self.bias)

    def _packed_weight(self) -> Tensor:
        weight = self.weight
        if self._packed is None or not self._packed.is_of(weight):
            self._packed = Packed(weight.detach(), weight._version, _optimizer_steps, pack(weight))
        return self._packed.packed

    def train(self, mode: bool = True) -> Linear:
        self._packed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the packed weight."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
