"""The cache of a whole model: the states of its layers, as Hugging Face knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, QuantizedCache, StaticCache

from newllm.errors import UserError
from newllm.models.cache.state import LayerState, check_precision


class LMCache(Cache):
    """The states of all layers of one model, those that grow with the text stored at one precision."""

    layers: list[LayerState]  # type: ignore[assignment]
    made_for: Any = None
    """What tells the states of the model for which it was made from those of others."""

    def __init__(self, layers: Iterable[LayerState], precision: str = "model") -> None:
        super().__init__(layers=list(layers))
        for state in self.layers:
            state.precision = check_precision(precision)

    def parts(self) -> list[LayerState]:
        """The states of all layers, those that are made of several taken apart."""
        return [part for state in self.layers for part in state.parts()]

    def reset(self) -> None:
        """All rows start a new document, as by `reset_rows`."""
        super().reset()

    def reset_rows(self, rows: Tensor) -> None:
        """Rows where `rows` (B,) is True start a new document: they forget everything, also a memory of the model's
        with which this cache was made."""
        for state in self.layers:
            state.reset_rows(rows)

    def detach_(self) -> None:
        for state in self.layers:
            state.detach_()

    def export(self) -> dict[str, Tensor]:
        """All states as named tensors, 'layer.name': what safetensors can save."""
        return {f"{n}.{name}": t for n, state in enumerate(self.layers) for name, t in state.export().items()}

    def restore(self, exported: dict[str, Tensor]) -> None:
        """Takes the place of what `export` gave.

        Raises ValueError, and changes nothing, for states that those of this cache cannot be.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in exported.items():
            layer, _, name = key.partition(".")
            parts.setdefault(layer, {})[name] = tensor
        expected = {str(n) for n in range(len(self.layers))}
        if set(parts) != expected or not all("seen" in part for part in parts.values()):
            raise ValueError(f"these are not the states of {len(self.layers)} layers: {', '.join(exported)}")
        for n, state in enumerate(self.layers):
            state.check({name: tensor for name, tensor in parts[str(n)].items() if name != "seen"})
        for n, state in enumerate(self.layers):
            state.restore(parts[str(n)])


def adopt(cache: Cache, make_cache: Callable[[], LMCache], made_for: Any, rows: int) -> Cache:
    """Gives an empty cache, such as the DynamicCache that `generate` makes, the states this model needs.

    made_for: that of the model's own caches; rows: of the tokens that are to be read.

    Raises UserError for a cache of a fixed size, for one that quantises or moves what it holds, which our states would
    not be; for one that another model has filled, or one of other rows.
    """
    if isinstance(cache, StaticCache):
        raise UserError("a static cache cannot hold this model's states: leave cache_implementation out")
    if isinstance(cache, QuantizedCache):
        raise UserError(
            "a quantised cache of Hugging Face cannot hold this model's states: leave cache_implementation out, and "
            "make or load the model with cache_precision='int8' or 'int4'"
        )
    if getattr(cache, "offloading", False):
        raise UserError("an offloaded cache cannot hold this model's states: leave cache_implementation out")
    if cache.layers and all(isinstance(state, LayerState) for state in cache.layers):
        others = getattr(cache, "made_for", None) not in (None, made_for)
    else:
        others = any(getattr(layer, "is_initialized", False) for layer in cache.layers)
        if not others:
            cache.layers, cache.made_for = make_cache().layers, made_for  # type: ignore[assignment, attr-defined]
    if others:
        raise UserError(
            "past_key_values belongs to a model of other layers: pass None, or what make_cache() of this model gives"
        )
    if cache.get_seq_length():
        tensors = cache.layers[0].tensors().values()  # type: ignore[union-attr]
        if read := {len(tensor) for tensor in tensors} - {rows}:
            raise UserError(f"past_key_values has read {max(read)} rows: it cannot go on with {rows}")
    return cache
