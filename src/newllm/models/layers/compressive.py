"""What all layers with compressive memories have in common: segments, local attention, writing, gating.

The layer types differ in how many memories there are and how what is read from them is mixed, each in its own file.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newllm.errors import UserError, nearest
from newllm.models.cache import LayerState, MemoryState
from newllm.models.layers.base import MLP, Layer
from newllm.models.linear import Linear
from newllm.models.options import check_count, check_divides, check_switch
from newllm.models.positions import NoPosition, RotaryPosition, create_position, position_spec
from newllm.models.segment_attention import LOCAL, SegmentAttention
from newllm.ops import reference
from newllm.ops.linear_attention import feature_map
from newllm.ops.memory import Found, read, read_segments, write
from newllm.ops.segments import lay_out, pick, shift

MEMORY_GRAD = ("through", "detach")


class CompressiveLayer(Layer):
    """x + mixed(ln1 x) + mlp(ln2 x), where mixed = g · (read from memory) + (1 − g) · (attention within the segment).

    The text is read in segments of S tokens. A token attends to its own segment up to itself, and reads from N memories
    what earlier segments wrote: σ(q) M / (σ(q)·z). When a segment is full it is written to the memory whose turn it is:
    M += σ(K)ᵀ V', z += Σ σ(K), with V' = V or, by the delta rule, V − σ(K) M / (σ(K) z). Memory and attention share
    queries, keys and values; those of the memory carry no position. g = sigmoid(β), one for each memory head; while the
    memories are empty, the local attention alone counts.

    With key_shift a memory takes a token's value by the key of the token before it: "what came after this". A layer
    then recalls what followed an earlier occurrence by itself, where otherwise a layer below must first have brought
    the two tokens together. (The shortest of the short convolutions of recurrent mixers.) Nothing comes before the
    first token of a text: it is written by features of zeros, which is not at all. (A key of zeros would have features
    of one, and fit every query.) Of the last token read the memory keeps the features, for the next one's value.

    A segment is S real tokens of its row, wherever padding stands.
    """

    closed_beta: ClassVar[float] = -math.inf
    """The β by which nothing that is read counts: g = 0."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_memories: int,
        segments_per_memory: int,
        segment_length: int,
        local: str,
        position: str | dict[str, Any],
        memory_head_dim: int | None,
        use_delta_rule: bool,
        memory_grad: str,
        key_shift: bool,
    ) -> None:
        super().__init__()
        memory_head_dim = hidden_size if memory_head_dim is None else memory_head_dim
        check_count("segment_length", segment_length)
        check_count("memory_head_dim", memory_head_dim)
        check_divides("hidden_size", hidden_size, "num_heads", num_heads)
        check_divides("hidden_size", hidden_size, "memory_head_dim", memory_head_dim)
        for name, value, valid in (("local", local, LOCAL), ("memory_grad", memory_grad, MEMORY_GRAD)):
            if value not in valid:
                raise nearest(str(value), list(valid), name, f"of layer type '{self.type_name}'")
        check_switch("use_delta_rule", use_delta_rule)
        check_switch("key_shift", key_shift)
        head_size = hidden_size // num_heads
        self.attention = SegmentAttention(num_heads, head_size, create_position(position, head_size), local)
        # A complete spec has the default one.
        if local == "linear" and self.attention.position not in (RotaryPosition(), NoPosition()):
            raise UserError("position is that of local=softmax, and local=linear has none: leave it out")
        self._arguments |= {"position": position_spec(self.attention.position), "memory_head_dim": memory_head_dim}
        self.num_memories, self.segments_per_memory = num_memories, segments_per_memory
        self.num_memory_heads, self.memory_head_dim = hidden_size // memory_head_dim, memory_head_dim
        self.hidden_size, self.segment_length = hidden_size, segment_length
        self.use_delta_rule, self.memory_grad, self.key_shift = use_delta_rule, memory_grad, key_shift
        # Memories that are read but not written outside training. No part of the spec, see `models/memory.py`.
        self.frozen: set[int] = set()
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)
        self.mlp = MLP(hidden_size, intermediate_size)
        if num_memories:
            self.beta = nn.Parameter(torch.zeros(self.num_memory_heads))
        self._make_mixer()

    def _make_mixer(self) -> None:
        """The parameters of `mix`, where it has any."""

    def reset_parameters(self) -> None:
        if self.num_memories:
            nn.init.zeros_(self.beta)  # g = 1/2

    def gate_parameters(self) -> list[nn.Parameter]:
        return [self.beta] if self.num_memories else []

    def gates(self) -> Tensor:
        """g of each memory head (Hm,), detached; none without memories."""
        return self.beta.detach().sigmoid() if self.num_memories else torch.zeros(0)

    def mix(self, q: Tensor, found: Found) -> Tensor:
        """One read of each query, from what it found in N memories: (B, Hm, G, S, d); q (B, Hm, G, S, d) features."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, state: MemoryState | None) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)  # (B, T, D)
        return self._finish(x, self._mixed(q, k, v, mask, state))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: MemoryState | None) -> Tensor:
        """What T tokens (B, T, D) read and attend to, (B, T, D), before the output projection; advances the state."""
        T = q.shape[1]
        real = None if mask is None else mask[:, mask.shape[1] - T :]
        with exact_products(q):
            if state is None:
                return self._whole(q, k, v) if real is None else self._chunk(q, k, v, real, MemoryState())
            return self._token(q, k, v, real, state) if T == 1 else self._chunk(q, k, v, real, state)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A whole text without padding (B, T, D): its first token begins the first segment of every row."""
        B, T, _ = q.shape
        S = self.segment_length
        complete = torch.full((B,), T // S, device=q.device)
        q, k, v = (F.pad(x, (0, 0, 0, self._slots(T) - T)) for x in (q, k, v))
        # A segment after which nothing comes need not be written.
        mixed, _ = self._segments(q, k, v, self._empty_memory(q), complete, writes=(T - 1) // S)
        return mixed[:, :T]

    def _slots(self, tokens: int) -> int:
        """Places for so many tokens of a row: whole segments, or where they do not fill one, as many as they are."""
        S = self.segment_length
        return max(1, tokens) if tokens < S else -(-tokens // S) * S

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: MemoryState) -> Tensor:
        """Any number of tokens (B, T, D) after what the state holds.

        Every row's real tokens, those of its pending segment first, are laid side by side into segments, and what
        becomes of the new ones is picked from there.

        real: (B, T) bool; None if all are.
        """
        B, T, _ = q.shape
        S = self.segment_length
        memory, keys, values, filled = self._open(state, k)
        held = torch.arange(S, device=q.device) >= S - filled[:, None]
        real = torch.ones(B, T, dtype=torch.bool, device=q.device) if real is None else real
        present = torch.cat([held, real], dim=1)  # (B, S + T)
        ranks = present.cumsum(dim=1)
        count = ranks[:, -1]
        most = max(count.tolist(), default=0)
        size = self._slots(most)
        slots = torch.where(present, ranks - 1, size)  # what is not there goes to a slot behind the last
        k, v = (lay_out(torch.cat(parts, dim=1), slots, size) for parts in ((keys, k), (values, v)))
        q = lay_out(q, slots[:, S:], size)
        mixed, memory = self._segments(q, k, v, memory, count // S, writes=most // S)
        newest = (count[:, None] - S + torch.arange(S, device=q.device)).clamp(min=0)
        pending = {"keys": pick(k, newest), "values": pick(v, newest), "filled": count % S}
        state.write(T, **memory, **pending)
        return pick(mixed, slots[:, S:].clamp(max=size - 1))

    def _token(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: MemoryState) -> Tensor:
        """One token (B, 1, D) after what the state holds: `_chunk` for a single query."""
        S = self.segment_length
        memory, old_keys, old_values, old_filled = self._open(state, k)
        keys, values = (torch.cat([old[:, 1:], x], dim=1) for old, x in ((old_keys, k), (old_values, v)))
        filled = old_filled + 1
        held = torch.arange(S, device=q.device) >= S - filled[:, None]
        mixed = self.attention.last(q, keys, values, held).unsqueeze(1)
        if self.num_memories:
            features = self._features(q.unsqueeze(1))
            reads, mass = read(features.unsqueeze(1), memory["matrix"].unsqueeze(3), memory["normaliser"].unsqueeze(3))
            mixed = self._gate(features, Found(reads, mass, memory["normaliser"].unsqueeze(3)), mixed)
        if real is not None:  # a row that reads padding stays as it is
            keys, values = (torch.where(real[..., None], *pair) for pair in ((keys, old_keys), (values, old_values)))
            filled = torch.where(real[:, 0], filled, old_filled)
        full = filled == S
        if full.any():
            memory = self._write(keys, values, filled, memory, full)
        state.write(1, **memory, keys=keys, values=values, filled=filled.masked_fill(full, 0))
        return mixed[:, 0]

    def write_pending(self, state: MemoryState) -> None:
        """Writes every row's pending tokens as a segment of their own, as where a text ends."""
        values = state.tensors()
        if not values.keys() >= {"keys", "filled"}:
            return
        filled = values["filled"]
        with exact_products(filled):
            memory = self._write(values["keys"], values["values"], filled, state.memory(), filled > 0)
        state.write(0, **memory, filled=torch.zeros_like(filled))

    def _segments(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: dict[str, Tensor],
        complete: Tensor,
        *,
        writes: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All of G segments (B, G·S, D), the first `complete` (B,) of which are full and written; or of a shorter one.

        writes: no row writes more than so many, or what it writes after them does not matter.
        """
        q, k, v = (x.unflatten(1, (-1, min(x.shape[1], self.segment_length))) for x in (q, k, v))
        mixed = self.attention.whole(q, k, v)  # (B, G, S, D)
        if self.num_memories:
            G = q.shape[1]
            order = torch.arange(G, device=q.device)
            turns = self._turns(memory["written"][:, None] + order).masked_fill(order >= complete[:, None], -1)
            features = self._features(q)
            k, v = self._to_write(k, v)
            matrix, normaliser, rule = memory["matrix"], memory["normaliser"], self.use_delta_rule
            if self.key_shift:
                k, before = shift(k, memory["before"], complete * self.segment_length)
                memory = memory | {"before": before}
            found, matrix, normaliser = read_segments(
                features, k, v, matrix, normaliser, turns, delta=rule, writes=writes
            )
            mixed = self._gate(features, found, mixed)
            written = memory["written"] + (turns >= 0).sum(dim=1)
            memory = memory | {"matrix": matrix, "normaliser": normaliser, "written": written}
        return mixed.flatten(1, 2), memory

    def _write(
        self, keys: Tensor, values: Tensor, filled: Tensor, memory: dict[str, Tensor], rows: Tensor
    ) -> dict[str, Tensor]:
        """Writes the last `filled` (B,) of S tokens (B, S, D) in the rows where `rows` (B,) is True."""
        if not self.num_memories:
            return memory
        turns = self._turns(memory["written"]).masked_fill(~rows, -1)
        place = torch.arange(self.segment_length, device=keys.device) - (self.segment_length - filled[:, None])
        place = place[:, None, :, None]  # of a token in what is written, in (B, Hm, S, d)
        k, v = (x[:, :, 0] for x in self._to_write(keys.unsqueeze(1), values.unsqueeze(1)))
        if self.key_shift:
            before, last = memory["before"].unsqueeze(2), k[:, :, -1]
            k = torch.where(place == 0, before, F.pad(k[:, :, :-1], (0, 0, 1, 0)))
            memory = memory | {"before": torch.where(rows[:, None, None], last, memory["before"])}
        k = k * (place >= 0)
        matrix, normaliser = write(k, v, memory["matrix"], memory["normaliser"], turns, delta=self.use_delta_rule)
        return memory | {"matrix": matrix, "normaliser": normaliser, "written": memory["written"] + (turns >= 0)}

    def _turns(self, segments: Tensor) -> Tensor:
        """The memory to which each segment, counted from the first that was written, goes; −1 if all are frozen."""
        open_ones = [n for n in range(self.num_memories) if self.training or n not in self.frozen]
        if not open_ones:
            return torch.full_like(segments, -1)
        return torch.tensor(open_ones, device=segments.device)[segments // self.segments_per_memory % len(open_ones)]

    def _open(self, state: MemoryState, like: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """The memory, pending keys and values (B, S, D), their number (B,)."""
        state.begin(len(like))
        held = state.tensors()
        memory = state.memory() or self._empty_memory(like)
        if "keys" not in held:
            nothing = like.new_zeros(len(like), self.segment_length, like.shape[2])
            none = torch.zeros(len(like), dtype=torch.long, device=like.device)
            return memory, nothing, nothing, none
        return memory, held["keys"], held["values"], held["filled"]

    def _empty_memory(self, like: Tensor) -> dict[str, Tensor]:
        """Memories of zeros for the rows of `like` (B, T, D)."""
        sums = torch.promote_types(like.dtype, torch.float32)
        return {
            name: torch.zeros(len(like), *shape, dtype=torch.long if name == "written" else sums, device=like.device)
            for name, shape in self.memory_shapes().items()
        }

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of one row's memory, see `MemoryState`."""
        N, Hm, d = self.num_memories, self.num_memory_heads, self.memory_head_dim
        if not N:
            return {"written": ()}
        before = {"before": (Hm, d)} if self.key_shift else {}
        return {"matrix": (N, Hm, d, d), "normaliser": (N, Hm, d), "written": (), **before}

    def _memory_heads(self, x: Tensor) -> Tensor:
        """(B, G, S, D) to (B, Hm, G, S, d), in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.unflatten(-1, (self.num_memory_heads, self.memory_head_dim)).movedim(3, 1)

    def _features(self, x: Tensor) -> Tensor:
        """σ of queries or keys (B, G, S, D), in memory heads (B, Hm, G, S, d)."""
        return feature_map(self._memory_heads(x))

    def _to_write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, S, D) as memories take them: features (B, Hm, G, S, d), and values of that shape."""
        if self.memory_grad == "detach":
            k, v = k.detach(), v.detach()
        return self._features(k), self._memory_heads(v)

    def _gate(self, q: Tensor, found: Found, local: Tensor) -> Tensor:
        """g · read + (1 − g) · local, in the shape and dtype of local (B, G, S, D); g = 0 where nothing was written."""
        gate = torch.where(found.mass.sum(dim=1) > 0, self.beta.sigmoid().to(q.dtype).view(-1, 1, 1), 0).unsqueeze(-1)
        local_heads = self._memory_heads(local)
        mixed = local_heads + gate * (self.mix(q, found) - local_heads)
        return mixed.movedim(1, 3).flatten(3).to(local.dtype)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output projection of what was mixed (B, T, D), MLP, and the residual."""
        return x + self.out(mixed) + self.mlp(self.norm_mlp(x))

    def make_state(self) -> LayerState:
        return MemoryState()

    def memory_bytes(self, element_size: int = 4) -> int:
        """Closed form of one row's memories: N·Hm·(d² + d) numbers, of 4 bytes unless the model is in float64."""
        d = self.memory_head_dim
        return self.num_memories * self.num_memory_heads * (d * d + d) * max(element_size, 4)

    def state_bytes(self, tokens: int, element_size: int) -> int:
        pending = 2 * self.segment_length * self.hidden_size * element_size
        before = self.hidden_size * max(element_size, 4) if self.key_shift and self.num_memories else 0
        return self.memory_bytes(element_size) + before + pending + 2 * 8  # and two counts, int64

    def reference(self, x: Tensor, *, positions: Tensor, mask: Tensor | None) -> Tensor:
        return self._finish(x, self._reference_mixed(self.qkv(self.norm_attention(x)), mask))

    def _reference_mixed(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """The mixed values (B, T, D), row by row, token by token, head by head, over the real tokens alone."""
        rows = []
        for b, row in enumerate(qkv):
            real = torch.arange(len(row), device=row.device) if mask is None else mask[b].nonzero()[:, 0]
            mixed = torch.zeros_like(row[:, : self.hidden_size])
            rows.append(mixed.index_copy(0, real, self._reference_row(*row[real].chunk(3, dim=1))))
        return torch.stack(rows)

    def _reference_row(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The mixed values (T, D) of one row of real tokens."""
        S, N, Hm, d = self.segment_length, self.num_memories, self.num_memory_heads, self.memory_head_dim
        # memory[n][h] = (M, z)
        memory = [[(q.new_zeros(d, d), q.new_zeros(d)) for _ in range(Hm)] for _ in range(N)]
        out = []
        for number, start in enumerate(range(0, len(q), S)):
            segment = slice(start, start + S)
            local = self.attention.reference(q[segment], k[segment], v[segment])
            queries, keys, values = (x[segment].split(d, dim=1) for x in (q, k, v))  # Hm times (n, d)
            for t, attended in enumerate(local):
                parts = []
                for h, part in enumerate(attended.split(d)):
                    known = [memory[n][h] for n in range(N)]
                    if any(bool(z.any()) for _, z in known):
                        part = self.reference_gate(self.reference_mix(queries[h][t], known, h), part, h)
                    parts.append(part)
                out.append(torch.cat(parts))
            if N and len(local) == S:
                turn = number // self.segments_per_memory % N
                if self.key_shift:  # a value by the key before it; that of the text's first token not at all
                    first = max(start, 1)
                    keys, values = k[first - 1 : start + S - 1].split(d, dim=1), v[first : start + S].split(d, dim=1)
                for h in range(Hm):
                    M, z = memory[turn][h]
                    memory[turn][h] = reference.write_memory(keys[h], values[h], M, z, self.use_delta_rule)
        return torch.stack(out)

    def reference_gate(self, read: Tensor, local: Tensor, h: int) -> Tensor:
        """What head h makes of a read (d) and what was attended to (d): (d)."""
        g = self.beta[h].sigmoid()
        return g * read + (1 - g) * local

    def reference_mix(self, q: Tensor, known: list[tuple[Tensor, Tensor]], h: int) -> Tensor:
        """What one query (d) of head h makes of N memories (M, z), at least one of which is not empty: (d)."""
        raise NotImplementedError


def exact_products(x: Tensor) -> torch.autocast:
    """Inside, products are of the dtype of their factors: autocast would make those of the memories bf16."""
    return torch.autocast(x.device.type, enabled=False)
