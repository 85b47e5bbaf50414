"""What a cache costs, read from its live tensors and never from a formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class CacheBytes(NamedTuple):
    """Bytes of a cache, all rows and layers together."""

    used: int
    """Bytes of the numbers that hold state; rows that are one in memory, as those which read one memory, count once."""
    allocated: int
    """Bytes of the storages behind them, spare room for growth included."""


def cache_bytes(cache: Any) -> CacheBytes:
    """Measures a Hugging Face cache: ours, or any other (then every tensor of its layers counts as used).

    A storage that several tensors or layers share is allocated once.
    """
    used, storages = 0, {}
    for layer in cache.layers:
        reachable = list(_tensors(vars(layer)))
        holding = layer.tensors().values() if hasattr(layer, "tensors") else reachable
        used += sum(_own_bytes(tensor) for tensor in holding)
        for tensor in (*reachable, *holding):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return CacheBytes(used, sum(storages.values()))


def _own_bytes(tensor: Tensor) -> int:
    """Of its numbers, those that `expand` repeats counted once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside nested containers."""
    from torch import Tensor

    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
