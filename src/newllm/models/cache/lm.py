"""The cache of a whole model: the states of its layers, as Hugging Face knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from transformers.cache_utils import Cache, StaticCache

from newllm.errors import UserError
from newllm.models.cache.state import LayerState, check_precision


class LMCache(Cache):
    """The states of all layers of one model, those that grow with the text stored at one precision."""

    layers: list[LayerState]  # type: ignore[assignment]

    def __init__(self, layers: Iterable[LayerState], precision: str = "model") -> None:
        super().__init__(layers=list(layers))
        for state in self.layers:
            state.precision = check_precision(precision)

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


def adopt(cache: Cache, make_cache: Callable[[], LMCache]) -> Cache:
    """Gives an empty cache, such as the DynamicCache that `generate` makes, the states this model needs.

    Raises ValueError for a cache of a fixed size, or one that another kind of model has already filled.
    """
    if isinstance(cache, StaticCache):
        raise UserError("a static cache cannot hold this model's states: leave cache_implementation out")
    if all(isinstance(state, LayerState) for state in cache.layers) and cache.layers:
        return cache
    if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
        raise ValueError("past_key_values was filled by another model: pass None or model.make_cache()")
    cache.layers = make_cache().layers  # type: ignore[assignment]
    return cache
