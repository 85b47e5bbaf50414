"""What compressive memories are worth to a trained model: its gates, and its perplexity with them closed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from newllm.evaluation.perplexity import perplexity, token_weighted_loss
from newllm.models.layers.hierarchical import HierarchicalLayer
from newllm.models.memory import layers_with_memories
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import TokenFile
    from newllm.models import TransformerLM


def memory_figures(model: TransformerLM, tokens: TokenFile, settings: CommonSettings) -> dict[str, Any] | None:
    """Gates of every layer with memories, and what closing them costs; None for a model without one.

    "ppl" is over the windows of training, "closed_ppl" the same with every g = 0: local attention alone, in a model
    that has learned to lean on its memory, which is more than what a model trained without one would lose. With fine
    memories, "fine_closed_ppl" has every γ = 0, the coarse memory alone, and "fine_open" is the mean γ of a layer's
    queries that found anything.
    """
    layers = layers_with_memories(model.layers)
    if not layers:
        return None
    hierarchical = [layer for layer in layers.values() if isinstance(layer, HierarchicalLayer)]
    with watching(hierarchical) as openings:
        figures: dict[str, Any] = {"ppl": perplexity(token_weighted_loss(model, tokens, settings))}
    figures["layers"] = [
        {
            "layer": n,
            "type": layer.type_name,
            "gates": layer.gates().tolist(),
            "fine_open": openings[layer].mean if isinstance(layer, HierarchicalLayer) else None,
        }
        for n, layer in layers.items()
    ]
    with closed_gates(layers.values()):
        figures["closed_ppl"] = perplexity(token_weighted_loss(model, tokens, settings))
    figures["fine_closed_ppl"] = None
    if hierarchical:
        with contextlib.ExitStack() as hooks:
            for layer in hierarchical:
                hooks.enter_context(layer.fine_gate.register_forward_hook(lambda m, i, gate: torch.zeros_like(gate)))
            figures["fine_closed_ppl"] = perplexity(token_weighted_loss(model, tokens, settings))
    return figures


@contextlib.contextmanager
def closed_gates(layers) -> Iterator[None]:
    """Inside, every g is 0: nothing that is read from a memory counts."""
    layers = list(layers)
    saved = [(layer.beta, layer.beta.detach().clone()) for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.beta.fill_(layer.closed_beta)
        try:
            yield
        finally:
            for beta, value in saved:
                beta.copy_(value)


class Mean:
    """Running mean."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


@contextlib.contextmanager
def watching(layers: list[HierarchicalLayer]) -> Iterator[dict[HierarchicalLayer, Mean]]:
    """Means of γ over what the layers read inside; queries that found nothing do not count."""
    means = {layer: Mean() for layer in layers}

    with contextlib.ExitStack() as hooks:
        for layer, mean in means.items():
            watch = Watch(mean)
            hooks.enter_context(layer.register_forward_pre_hook(watch.on_layer))
            hooks.enter_context(layer.fine_gate.register_forward_hook(watch.on_gate))
        yield means


class Watch:
    """Adds up γ of the tokens that a layer reads, not of those that fill its last segment up."""

    def __init__(self, mean: Mean) -> None:
        self.mean, self.tokens = mean, 0

    def on_layer(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.tokens = inputs[0].shape[1]

    def on_gate(self, module: nn.Module, inputs: tuple[Tensor], gate: Tensor) -> None:
        """gate (B, Hm, G, S, 1) of what was read from the coarse memory, zeros where that was empty."""
        found = inputs[0].any(dim=-1, keepdim=True)
        gate, found = (x.flatten(2, 3)[:, :, : self.tokens] for x in (gate, found))
        self.mean.add(gate[found])
