"""States that grow with the text: keys and values, or a latent, of every token still visible."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newllm.models.cache.state import LayerState
from newllm.ops.quantize import BITS, CODE_DTYPES, Quantized, groups, quantize, vector_bytes


class TokenState(LayerState):
    """Named streams of numbers for every token still visible, in buffers that grow by an eighth: no concatenation.

    Each stream is (B, N, S, d) with N and d of its own. Copying at each growth costs a token eight copies of itself,
    while decoding reads the whole cache at every step: spare room is dearer than growth. Allocated bytes stay
    ≤ 1.25 × used once there are a few tokens. With a window W, the last W − 1 tokens are kept, of every row real ones.
    While gradients flow (chunked training), the buffers are concatenated instead: autograd forbids writing in place.

    With a quantised precision a stream is held as two buffers, NAME.codes and NAME.scales (`ops.quantize`), and every
    token is read from its codes, also by the chunk it came with: how a text is cut into chunks changes nothing.
    """

    def __init__(self, names: tuple[str, ...], window: int | None = None) -> None:
        super().__init__()
        self.names = names
        self.window = window
        self.start = 0  # the visible tokens stand at [start, stop) of the buffers
        self.stop = 0
        self.buffers: dict[str, Tensor] = {}  # each (B, N, C, d), all of one capacity C
        self.hidden_before: Tensor | None = None  # (B,) tokens before this count belong to an earlier document

    def update(  # type: ignore[override]
        self, *streams: Tensor, mask: Tensor | None = None, as_stored: bool = False
    ) -> tuple[Any, ...]:
        """Appends one (B, N, T, d) to each stream, in the order of the names.

        Args:
            mask: (B, S_all) bool over all tokens read so far, this chunk included; True for real tokens.
            as_stored: whether quantised streams are given as `Quantized`, which `causal_attention` takes.

        Returns:
            each stream (B, N, S, d) as far as this chunk sees it (views of the buffers; new tensors if quantised and
            not as stored), and their mask (B, S) or None.

        Raises:
            ValueError: for a gradient through a quantised state.
        """
        new = self._encode(streams)
        T = streams[0].shape[2]
        if any(x.requires_grad for x in (*new.values(), *self.buffers.values())):
            self._concatenate(new)
        else:
            self._make_room(new)
            for name, x in new.items():
                self.buffers[name][:, :, self.stop : self.stop + T] = x
            self.stop += T
        self.seen += T
        read = self._read(streams)
        if not as_stored:
            read = [
                x.numbers(new.dtype) if isinstance(x, Quantized) else x for x, new in zip(read, streams, strict=True)
            ]
        visible = self._visible(mask)
        if self.window is not None:
            self._forget(self._still_seen(visible))
        return *read, visible

    def _encode(self, streams: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What the buffers hold of the streams, by the buffers' names."""
        if self.precision == "model":
            return dict(zip(self.names, streams, strict=True))
        if any(x.requires_grad for x in streams):
            raise ValueError(
                f"a cache of precision '{self.precision}' passes no gradient: read under torch.no_grad(), or through "
                "model.make_cache('model')"
            )
        bits = BITS[self.precision]
        parts = zip(self._buffer_names, itertools.chain(*(quantize(x, bits) for x in streams)), strict=True)
        return dict(parts)

    def _read(self, streams: tuple[Tensor, ...]) -> list[Tensor | Quantized]:
        """The visible tokens of each stream, as they are stored."""
        views: list[Any] = list(self._views().values())
        if self.precision == "model":
            return views
        return [
            Quantized(codes, scales, BITS[self.precision], x.shape[3])
            for codes, scales, x in zip(views[::2], views[1::2], streams, strict=True)
        ]

    @property
    def _buffer_names(self) -> list[str]:
        parts = ("",) if self.precision == "model" else (".codes", ".scales")
        return [name + part for name in self.names for part in parts]

    def _views(self) -> dict[str, Tensor]:
        return {name: buffer[:, :, self.start : self.stop] for name, buffer in self.buffers.items()}

    @property
    def _capacity(self) -> int:
        return next((buffer.shape[2] for buffer in self.buffers.values()), 0)

    def _still_seen(self, visible: Tensor | None) -> int:
        """How many of the last tokens hold W − 1 real ones of every row, which is what its next token sees.

        visible: (B, S) as `_visible` gives it.
        """
        assert self.window is not None
        if visible is None or self.stop - self.start < self.window:
            return self.window - 1
        from_end = visible.flip(1)
        seen = (from_end & (from_end.cumsum(dim=1) < self.window)).any(dim=0)
        return max(self.window - 1, int((torch.arange(1, len(seen) + 1, device=seen.device) * seen).max()))

    def _forget(self, kept: int) -> None:
        """Keeps the last `kept` tokens; frees the room of a long chunk that has passed through the window."""
        self.start = max(self.start, self.stop - kept)
        if self._capacity > with_spare_room(kept) + 1:
            self.buffers = {name: view.clone() for name, view in self._views().items()}
            self.start, self.stop = 0, self.stop - self.start

    def _concatenate(self, new: dict[str, Tensor]) -> None:
        if self.buffers:
            new = {name: torch.cat([view, new[name]], dim=2) for name, view in self._views().items()}
        self.buffers = new
        self.start, self.stop = 0, self._capacity

    def _make_room(self, new: dict[str, Tensor]) -> None:
        """Room for the new tokens. Zeros, since attention multiplies what is not yet written by 0.

        What was allocated in inference mode cannot be written to outside it, and moves.
        """
        used, T = self.stop - self.start, next(iter(new.values())).shape[2]
        if not self.buffers:
            self.buffers = {name: torch.zeros_like(x, memory_format=torch.contiguous_format) for name, x in new.items()}
        elif self.stop + T > self._capacity or (
            not torch.is_inference_mode_enabled() and any(x.is_inference() for x in self.buffers.values())
        ):
            kept = used + T if self.window is None else max(self.window - 1, T)
            capacity = max(used + T, with_spare_room(kept))
            for name, old in self._views().items():
                self.buffers[name] = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                self.buffers[name][:, :, :used] = old
            self.start, self.stop = 0, used

    def _visible(self, mask: Tensor | None) -> Tensor | None:
        """(B, S) over the visible tokens: real ones of the current document."""
        S = self.stop - self.start
        visible = None if mask is None else mask[:, mask.shape[1] - S :].bool()
        if self.hidden_before is not None:
            order = torch.arange(self.seen - S, self.seen, device=self.hidden_before.device)
            current = order >= self.hidden_before[:, None]
            visible = current if visible is None else visible & current
        return visible

    def bytes_at(self, precision: str) -> int:
        if precision == "model":
            return super().bytes_at(precision)
        streams = sum(x[..., 0].numel() * vector_bytes(x.shape[3], BITS[precision]) for x in self._views().values())
        return streams + (0 if self.hidden_before is None else self.hidden_before.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        hidden = {} if self.hidden_before is None else {"hidden_before": self.hidden_before}
        return self._views() | hidden

    def check(self, tensors: dict[str, Tensor]) -> None:
        super().check(tensors)
        streams = {name: tensor for name, tensor in tensors.items() if name != "hidden_before"}
        if tensors and set(streams) != set(self._buffer_names):
            raise ValueError(f"a state of precision '{self.precision}' cannot hold {', '.join(tensors)}")
        bits = BITS.get(self.precision)
        lengths = {x.shape[2:3] for x in streams.values()}
        for name, x in streams.items():
            old = self.buffers.get(name, x)
            fits = x.dim() == 4 and len(lengths) == 1 and x.shape[1::2] == old.shape[1::2]
            if bits is None:
                fits &= x.is_floating_point()
            elif name.endswith(".codes"):
                fits &= x.dtype == CODE_DTYPES[bits]
            else:
                *places, width = streams[name.removesuffix("scales") + "codes"].shape
                fits &= x.dtype == torch.float16 and x.shape == (*places, groups(width * 8 // bits))
            if not fits:
                shapes = {name: (*x.shape, x.dtype) for name, x in streams.items()}
                raise ValueError(f"{name} does not fit into this state of precision '{self.precision}': {shapes}")

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.check(tensors)
        self.buffers = {name: tensors[name] for name in self._buffer_names if tensors}
        self.hidden_before = tensors.get("hidden_before")
        self.start, self.stop = 0, self._capacity

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        # On whole buffers, so that beam search keeps their spare room.
        self.buffers = {name: change(buffer) for name, buffer in self.buffers.items()}
        if self.hidden_before is not None:
            self.hidden_before = change(self.hidden_before)

    def reset(self) -> None:
        self.buffers, self.start, self.stop, self.seen, self.hidden_before = {}, 0, 0, 0, None

    def reset_rows(self, rows: Tensor) -> None:
        if not self.buffers:
            return  # nothing to forget
        rows = rows.to(next(iter(self.buffers.values())).device)
        if self.hidden_before is None:
            self.hidden_before = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        self.hidden_before = torch.where(rows, self.seen, self.hidden_before)


class KeyValueState(TokenState):
    """Keys and values of the visible tokens."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__(("keys", "values"), window)

    def update(  # type: ignore[override]
        self, k: Tensor, v: Tensor, mask: Tensor | None = None, as_stored: bool = False
    ) -> tuple[Any, Any, Tensor | None]:
        """Appends k (B, Hk, T, d) and v (B, Hk, T, dv); gives keys (B, Hk, S, d), values (B, Hk, S, dv), mask."""
        return super().update(k, v, mask=mask, as_stored=as_stored)  # type: ignore[return-value]


class LatentState(TokenState):
    """One latent vector for each visible token, from which a layer makes keys and values (MLA)."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__(("latent",), window)

    def update(  # type: ignore[override]
        self, c: Tensor, mask: Tensor | None = None, as_stored: bool = False
    ) -> tuple[Any, Tensor | None]:
        """Appends c (B, 1, T, r); gives the visible latents (B, 1, S, r) and their mask (B, S) or None."""
        return super().update(c, mask=mask, as_stored=as_stored)  # type: ignore[return-value]


def with_spare_room(tokens: int) -> int:
    """Capacity of a buffer that is to hold so many tokens and grow now and then."""
    return tokens + max(tokens // 8, 1)
