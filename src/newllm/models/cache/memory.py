"""The state of a layer with compressive memories: it does not grow with the text."""

from __future__ import annotations

from torch import Tensor

from newllm.models.cache.state import LayerState, RecurrentState

MEMORY = ("matrix", "normaliser", "written", "before")
PENDING = ("keys", "values", "filled")


class MemoryState(RecurrentState):
    """N memories per row, and the segment that is not yet written to one; both of fixed size.

    matrix (B, N, Hm, d, d) and normaliser (B, N, Hm, d) in float32 at least, see `ops.memory`; written (B,) int64
    counts the segments a row has written and says whose turn is next. A layer without memories has `written` alone.
    A layer that shifts keys also keeps before (B, Hm, d), the features of the last token that is no longer pending;
    zeros where there was none. keys and values (B, S, D), as the layer computes them, hold the pending segment: its
    filled (B,) int64 tokens, fewer than S, stand at the end.

    `memory` and `set_memory` take the memories out and put them in; what is pending is no part of them.
    """

    def begin(self, rows: int) -> None:
        """Gives memories of one row, set before the first token, to each of `rows` rows.

        Raises ValueError if they belong to another number of rows.
        """
        for name, tensor in self.values_by_name.items():
            if len(tensor) not in (1, rows):
                raise ValueError(f"the memory is that of {len(tensor)} rows: {rows} rows cannot read it")
            self.values_by_name[name] = tensor.expand(rows, *tensor.shape[1:])

    def memory(self) -> dict[str, Tensor]:
        """The memories alone; {} before anything was read."""
        return {name: tensor for name, tensor in self.values_by_name.items() if name in MEMORY}

    def set_memory(self, memory: dict[str, Tensor]) -> None:
        """Puts memories, of one row or of as many as the state has, in the place of those there are.

        Raises ValueError, and changes nothing, for tensors that are no memories or do not fit those there are.
        """
        if not is_memory(set(memory)):
            raise ValueError(f"a memory has the tensors {', '.join(MEMORY)}: these are {', '.join(memory) or 'none'}")
        rows = {len(tensor) for name, tensor in self.values_by_name.items()}
        for name, tensor in memory.items():
            old = self.values_by_name.get(name, tensor)
            if tensor.shape[1:] != old.shape[1:] or (rows and len(tensor) not in (1, *rows)):
                raise ValueError(f"{name} {tuple(tensor.shape)} does not fit a memory of {tuple(old.shape)}")
        self.values_by_name |= memory
        if rows:
            self.begin(max(rows))

    def check(self, tensors: dict[str, Tensor]) -> None:
        super().check(tensors)
        names = set(tensors)
        # Memories alone, of one that has read nothing yet, or with what is pending.
        if names and not (is_memory(names - {*PENDING}) and names & {*PENDING} in (set(), {*PENDING})):
            raise ValueError(f"these are not the tensors of a compressive memory: {', '.join(tensors)}")
        for name, tensor in tensors.items():
            old = self.values_by_name.get(name, tensor)
            if tensor.shape[1:] != old.shape[1:] or tensor.is_floating_point() != old.is_floating_point():
                raise ValueError(f"{name} {tuple(tensor.shape)} does not fit a state of {tuple(old.shape)}")


def memory_of(state: LayerState) -> MemoryState:
    """The memories in the state of a layer that has some."""
    return next(part for part in state.parts() if isinstance(part, MemoryState))


def is_memory(names: set[str]) -> bool:
    """Whether a layer has memories of these tensors: one without any, with shifted keys, or neither."""
    return names in ({"written"}, {"matrix", "normaliser", "written"}, set(MEMORY))
