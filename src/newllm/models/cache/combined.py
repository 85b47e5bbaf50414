"""The state of a layer that remembers in more than one way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from newllm.models.cache.state import LayerState


class CombinedState(LayerState):
    """States side by side, each advanced by its own part of the layer, which reads as many tokens with all of them.

    Their tensors are known by the part's name before their own: 'attention.keys', 'memory.matrix'.
    """

    def __init__(self, **states: LayerState) -> None:
        self.states = states
        super().__init__()

    def parts(self) -> list[LayerState]:
        return list(self.states.values())

    @property
    def seen(self) -> int:
        return self.parts()[0].seen

    @seen.setter
    def seen(self, tokens: int) -> None:
        for state in self.parts():
            state.seen = tokens

    @property
    def precision(self) -> str:
        return self.parts()[0].precision

    @precision.setter
    def precision(self, precision: str) -> None:
        for state in self.parts():
            state.precision = precision

    def tensors(self) -> dict[str, Tensor]:
        return {f"{part}.{name}": t for part, state in self.states.items() for name, t in state.tensors().items()}

    def check(self, tensors: dict[str, Tensor]) -> None:
        super().check(tensors)
        by_part = self._by_part(tensors)
        if unknown := sorted(by_part.keys() - self.states.keys()):
            raise ValueError(f"a state of the parts {', '.join(self.states)} cannot hold those of '{unknown[0]}'")
        for part, state in self.states.items():
            state.check(by_part.get(part, {}))

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.check(tensors)
        by_part = self._by_part(tensors)
        for part, state in self.states.items():
            state.replace(by_part.get(part, {}))

    def _by_part(self, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        by_part: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            by_part.setdefault(part, {})[name] = tensor
        return by_part

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for state in self.parts():
            state.change_rows(change)

    def reset(self) -> None:
        for state in self.parts():
            state.reset()

    def reset_rows(self, rows: Tensor) -> None:
        for state in self.parts():
            state.reset_rows(rows)

    def bytes_at(self, precision: str) -> int:
        return sum(state.bytes_at(precision) for state in self.parts())
