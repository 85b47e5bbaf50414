"""The memory a model holds between calls: what it has read, kept, moved to another model object, merged, frozen.

It is no parameter: `state_dict` and `save_pretrained` leave it out, training neither reads nor writes it. As plain
tensors it is a memory state, a dict with the names 'LAYER.matrix' (B, N, Hm, d, d), 'LAYER.normaliser' (B, N, Hm, d)
and 'LAYER.written' (B) of every layer that has memories, 'LAYER.before' (B, Hm, d) where it shifts keys, and
'LAYER.frozen' (F) where some of its memories are frozen; see `MemoryState`.
B is the number of rows that were read side by side; a state of one row serves any batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from newllm.errors import UserError
from newllm.models.cache import LMCache, memory_of
from newllm.models.layers.base import layer_type
from newllm.models.layers.compressive import CompressiveLayer

MemoryTensors = dict[str, Tensor]
MOST_SEGMENTS = 10**15  # more than anybody reads, and far from the end of int64


def layers_with_memories(layers: Iterable[nn.Module]) -> dict[int, CompressiveLayer]:
    """Those that have memories, by their place in the model."""
    return {n: layer for n, layer in enumerate(layers) if isinstance(layer, CompressiveLayer) and layer.num_memories}


class HoldsMemory:
    """What a language model can do with its memory; a mixin of `TransformerLM`."""

    layers: nn.ModuleList
    training: bool
    device: torch.device
    dtype: torch.dtype

    _memory: MemoryTensors
    """Without the frozen memories' indices, which the layers know. Never changed in place."""

    def memory_layers(self) -> dict[int, CompressiveLayer]:
        """The layers that have memories, by their place in the model. Raises UserError where there are none."""
        found = layers_with_memories(self.layers)
        if not found:
            raise UserError(f"this model has no memory layer; presets that have one: {', '.join(memory_presets())}")
        return found

    def reset_memory(self) -> None:
        """Makes the memory empty and no part of it frozen, as in a new model."""
        self.set_memory_state({})

    def get_memory_state(self) -> MemoryTensors:
        """A copy of the memory, in the dtypes of a state of this model; {} while it is empty and nothing is frozen."""
        frozen = {
            f"{n}.frozen": torch.tensor(sorted(layer.frozen))
            for n, layer in self.memory_layers().items()
            if layer.frozen
        }
        # The model may have changed its dtype since it read.
        memory = {name: tensor.to(self._memory_dtype(name), copy=True) for name, tensor in self._memory.items()}
        return memory | frozen

    def set_memory_state(self, state: MemoryTensors) -> None:
        """Puts a copy of `state` in the place of the memory.

        Raises:
            UserError: it is no state of this model; the memory is then as it was.
        """
        self.check_memory_state(state)
        for n, layer in self.memory_layers().items():
            layer.frozen = set(state.get(f"{n}.frozen", torch.tensor([])).tolist())
        self._memory = {name: copy_of(tensor) for name, tensor in state.items() if not name.endswith(".frozen")}

    def freeze_memory(self, banks: Iterable[int]) -> None:
        """Outside training, memories (banks) with these indices are from now on read and no longer written, in every
        memory layer."""
        banks, layers = set(banks), self.memory_layers()
        for n, layer in layers.items():
            self._check_banks(n, layer, banks)
        for layer in layers.values():
            layer.frozen = layer.frozen | banks

    def unfreeze_memory(self, banks: Iterable[int] | None = None) -> None:
        """Memories with these indices are written again; None: all."""
        banks = None if banks is None else set(banks)
        for n, layer in self.memory_layers().items():
            self._check_banks(n, layer, banks or set())
        for layer in self.memory_layers().values():
            layer.frozen = set() if banks is None else layer.frozen - banks

    @contextmanager
    def without_memory(self) -> Iterator[None]:
        """Inside, the memory is empty and nothing frozen; afterwards both are as before."""
        memory, frozen = self._memory, {layer: layer.frozen for layer in layers_with_memories(self.layers).values()}
        self._memory = {}
        for layer in frozen:
            layer.frozen = set()
        try:
            yield
        finally:
            self._memory = memory
            for layer, banks in frozen.items():
                layer.frozen = banks

    def check_memory_state(self, state: MemoryTensors) -> None:
        """Raises UserError, saying what differs, for what cannot be a memory state of this model."""
        layers = self.memory_layers()
        frozen = {f"{n}.frozen" for n in layers}
        expected = {
            f"{n}.{part}": shape for n, layer in layers.items() for part, shape in layer.memory_shapes().items()
        }
        if unknown := sorted(state.keys() - expected.keys() - frozen):
            raise UserError(f"memory state: '{unknown[0]}' is unknown here; the memory layers are {_names(layers)}")
        for n, layer in layers.items():
            if (indices := state.get(f"{n}.frozen")) is not None:
                if indices.dim() != 1 or indices.dtype != torch.int64:
                    kind = _kind(indices.shape, indices.dtype)
                    raise UserError(f"memory state: '{n}.frozen' is {kind}, here it would be a list of int64")
                self._check_banks(n, layer, set(indices.tolist()))
        if not state.keys() - frozen:
            return  # empty
        self._check_can_hold()
        if missing := sorted(expected.keys() - state.keys()):
            raise UserError(f"memory state: '{missing[0]}' is missing; the memory layers are {_names(layers)}")
        rows = max(1, count_rows(state))
        for name, shape in expected.items():
            tensor, dtype = state[name], self._memory_dtype(name)
            if tensor.shape != (rows, *shape) or tensor.dtype != dtype:
                raise UserError(
                    f"memory state: '{name}' is {_kind(tensor.shape, tensor.dtype)}, "
                    f"here it would be {_kind((rows, *shape), dtype)}"
                )
            if not tensor.isfinite().all():
                raise UserError(f"memory state: '{name}' holds numbers that are not finite")
            if not name.endswith(".matrix") and tensor.lt(0).any():  # sums of features, and counts
                raise UserError(f"memory state: '{name}' holds numbers below 0")
            if name.endswith(".written") and tensor.gt(MOST_SEGMENTS).any():
                raise UserError(f"memory state: '{name}' is more than {MOST_SEGMENTS:,} segments")

    def _memory_dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name.endswith(".written") else torch.promote_types(self.dtype, torch.float32)

    def _check_banks(self, n: int, layer: CompressiveLayer, banks: set[int]) -> None:
        for bank in banks - set(range(layer.num_memories)):
            raise UserError(f"there is no memory {bank} to freeze: layer {n} has {layer.num_memories}, counted from 0")

    # What `TransformerLM` calls.

    def _holds_memory(self) -> bool:
        """Whether reading through a fresh cache differs from reading without one."""
        return not self.training and bool(self._memory)

    def _start_from_memory(self, cache: LMCache) -> None:
        """Gives the memory to a fresh cache; in training it starts from nothing."""
        if self._holds_memory():
            for n, layer in self.memory_layers().items():
                names = {part: f"{n}.{part}" for part in layer.memory_shapes()}
                # The model may have been moved or changed its dtype since it read.
                memory = {p: self._memory[name].to(self.device, self._memory_dtype(name)) for p, name in names.items()}
                memory_of(cache.layers[n]).set_memory(memory)

    def _check_can_hold(self) -> None:
        """Raises UserError for a model that has memories, of which it could keep a part only."""

    def _check_can_update(self, cached: bool) -> None:
        self.memory_layers()
        if self.training:
            raise UserError("update_memory=True in training mode: training never uses the memory; call model.eval()")
        self._check_can_hold()
        if cached:
            raise UserError("update_memory=True goes on from the memory: leave past_key_values out")

    def _take_memory(self, cache: Cache) -> None:
        """What the cache has read, the last incomplete segment included, becomes the memory."""
        memory: MemoryTensors = {}
        for n, layer in self.memory_layers().items():
            state = memory_of(cache.layers[n])  # type: ignore[arg-type]
            layer.write_pending(state)
            memory |= {f"{n}.{part}": copy_of(tensor) for part, tensor in state.memory().items()}
        self._memory = memory


def copy_of(tensor: Tensor) -> Tensor:
    """Without gradient, and of use outside the inference mode in which it may be made."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


def count_rows(state: MemoryTensors) -> int:
    """B of a memory state that is not empty."""
    return next(tensor.numel() for name, tensor in state.items() if name.endswith(".written"))


def take_row(state: MemoryTensors, row: int) -> MemoryTensors:
    """The memory of one of the rows that were read side by side, as a state of one row."""
    return {name: t if name.endswith(".frozen") else t[row : row + 1].clone() for name, t in state.items()}


def merge_memory_states(model: HoldsMemory, states: Sequence[MemoryTensors]) -> MemoryTensors:
    """All rows of all states as one memory of one row: each bank as if all of them had written to it.

    With the linear rule a memory is a sum over what was written to it, so that this is exact (to rounding). The texts
    did not know of each other: a layer above another memory layer has read each of them as if it were the first. Where
    keys are shifted, nothing comes before what is read next.

    Raises:
        UserError: the delta rule, a frozen memory, a state that is not the model's or is empty, or none at all.
    """
    if not states or not all(states):
        raise UserError("merging needs memory states, and none that is empty")
    for n, layer in model.memory_layers().items():
        if layer.use_delta_rule:
            raise UserError(
                f"layer {n} writes by the delta rule: what it writes depends on what the memory held before, so "
                "memories that were written apart do not add up; use_delta_rule=false is the rule whose memories do"
            )
    for state in states:
        model.check_memory_state(state)
        if frozen := [name for name in state if name.endswith(".frozen")]:
            raise UserError(f"'{frozen[0]}': what is frozen in each of these memories would be counted more than once")
    merged = {name: sum_rows([state[name] for state in states]) for name in states[0]}
    return {name: torch.zeros_like(t) if name.endswith(".before") else t for name, t in merged.items()}


def sum_rows(tensors: Sequence[Tensor]) -> Tensor:
    """(1, …): the sum of all rows of tensors (B, …)."""
    return torch.cat(list(tensors)).sum(dim=0, keepdim=True)


def memory_presets() -> list[str]:
    """The presets with a layer that has memories."""
    from newllm.models.factory import load_preset, preset_names  # it makes models, and so needs this module

    def has_memory(spec: dict) -> bool:
        return issubclass(layer_type(spec["type"]), CompressiveLayer) and spec.get("num_memory_banks") != 0

    return [name for name in preset_names() if any(map(has_memory, load_preset(name)["layers"]))]


def _kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{' × '.join(map(str, shape)) or 'a single'} {str(dtype).removeprefix('torch.')}"


def _names(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
