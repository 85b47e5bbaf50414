"""What every state of a layer can do, and the state that does not grow with the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from newllm.errors import nearest
from newllm.ops.quantize import BITS

PRECISIONS = ("model", *BITS)


def check_precision(precision: str) -> str:
    """The precision of a cache: 'model' stores numbers as the layers compute them. Raises UserError for another one."""
    if precision not in PRECISIONS:
        raise nearest(str(precision), list(PRECISIONS), "cache_precision")
    return precision


class LayerState(CacheLayerMixin):
    """State of one layer. `seen` counts the tokens read, padding included.

    `precision` is how what grows with the text is stored; other states stay as they are. It is set before the first
    token.
    """

    precision = "model"

    is_compileable = False
    is_croppable = False  # a state that has moved on cannot be rolled back
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def parts(self) -> list[LayerState]:
        """The states this one is made of: itself, if it is no `CombinedState`."""
        return [self]

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors that hold the state, each (B, …): views on the used part only."""
        raise NotImplementedError

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError for tensors that cannot be this state's; none at all are those of an empty state."""
        sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if len({shape[:1] for shape in sizes.values()}) > 1:
            raise ValueError(f"the tensors of a state have one batch size: these have the shapes {sizes}")

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Puts other tensors in the place of `tensors()`. Raises ValueError, and changes nothing, as `check` says."""
        raise NotImplementedError

    def reset_rows(self, rows: Tensor) -> None:
        """Rows where `rows` (B,) is True forget everything they have read."""
        raise NotImplementedError

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of the batch dimension to every tensor."""
        self.replace({name: change(tensor) for name, tensor in self.tensors().items()})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def bytes_at(self, precision: str) -> int:
        """Closed form of the bytes that what this state of precision 'model' holds would take at another precision."""
        return bytes_of(self.tensors().values())

    def detach_(self) -> None:
        """Cuts the gradient to what was read so far (truncated back-propagation through time)."""
        self.change_rows(lambda tensor: tensor.detach())

    def export(self) -> dict[str, Tensor]:
        """A copy of the state: its tensors and `seen`; `restore` on a fresh state of the same layer brings it back."""
        copies = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        return copies | {"seen": torch.tensor(self.seen)}

    def restore(self, exported: dict[str, Tensor]) -> None:
        """Takes the place of what `export` gave. Raises ValueError, and changes nothing, as `check` says."""
        seen = int(exported["seen"])
        self.replace({name: tensor.clone() for name, tensor in exported.items() if name != "seen"})
        self.seen = seen

    # What Hugging Face asks of a cache layer.
    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to do: states take shape at their first update."""

    def update(self, *args, **kwargs):
        raise NotImplementedError

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(f"{type(self).__name__} cannot be rolled back by {abs(tokens_to_remove)} tokens")


class RecurrentState(LayerState):
    """Tensors of fixed size per row, by name. An absent name means that nothing has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.values_by_name: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor | None:
        """The (B, …) tensor of that name, or None before the first write."""
        return self.values_by_name.get(name)

    def write(self, tokens: int, **tensors: Tensor) -> None:
        """Stores the state after a chunk of `tokens` tokens; each tensor (B, …).

        Of a view the part is copied, as of the states after all tokens the last: what it is a part of can be freed.
        """
        self.values_by_name |= {
            name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
            for name, tensor in tensors.items()
        }
        self.seen += tokens

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.values_by_name)

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.check(tensors)
        self.values_by_name = dict(tensors)

    def reset(self) -> None:
        self.values_by_name, self.seen = {}, 0

    def reset_rows(self, rows: Tensor) -> None:
        self.change_rows(lambda x: x.masked_fill(rows.to(x.device).view(-1, *[1] * (x.dim() - 1)), 0))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of the tensors."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
