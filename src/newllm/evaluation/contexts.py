"""How long the contexts of a trained model keep what they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from newllm.evaluation.perplexity import token_weighted_loss
from newllm.models.context_cell import ContextCell
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import TokenFile
    from newllm.models import TransformerLM


def context_figures(model: TransformerLM, tokens: TokenFile, settings: CommonSettings) -> dict[str, Any] | None:
    """Time scales of every layer of contexts over the windows of training; None for a model whose contexts never fade.

    In c_t = a_t c_{t−1} + b_t a number of a context fades to 1/e in τ = −1 / mean(log a) tokens. Of the τ of a layer's
    K·S numbers "median" (of two in the middle the shorter) and "largest" are told; of gates which see the text these
    are what training has made of them.
    """
    cells = {name: cell for name, cell in model.named_modules() if isinstance(cell, ContextCell) and cell.fades}
    if not cells:
        return None
    with watching(cells) as fadings:
        token_weighted_loss(model, tokens, settings)
    layers = []
    for name, fading in fadings.items():
        top, number, *_ = name.split(".")
        scales = fading.time_scales()
        layers.append(
            {
                "layer": int(number) if top == "layers" else None,  # None: the context that stands before the layers
                "median": float(scales.median()),
                "largest": float(scales.max()),
            }
        )
    return {"layers": layers}


class Fading:
    """Mean of log a over rows and tokens, for each number of a layer's contexts."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, module: nn.Module, inputs: tuple[Tensor], retained: Tensor) -> None:
        """A forward hook; retained (…, K, S)."""
        logs = retained.detach().double().clamp(min=torch.finfo(torch.float64).tiny).log()
        logs = logs.reshape(-1, *logs.shape[-2:])  # without gates a is the same for all rows and tokens: (K, S)
        self.total = self.total + logs.sum(0)
        self.count += len(logs)

    def time_scales(self) -> Tensor:
        """τ in tokens, (K, S); infinite where nothing has faded."""
        return self.count / torch.as_tensor(self.total).abs()  # not −count / total, which is −∞ for a total of 0


@contextlib.contextmanager
def watching(cells: dict[str, ContextCell]) -> Iterator[dict[str, Fading]]:
    """What every cell has let fade of what is read inside."""
    fadings = {name: Fading() for name in cells}
    with contextlib.ExitStack() as hooks:
        for name, fading in fadings.items():
            hooks.enter_context(cells[name].retained.register_forward_hook(fading.add))
        yield fadings
