"""Position encodings, chosen by config: rotary (`rope`), linear bias (`alibi`), or none (`none`, NoPE).

A position encoding acts at two places of attention: `rotate` turns queries and keys before they meet,
`head_slopes` gives the bias subtracted from their scores. Tables are computed in forward: a non-persistent buffer would
come back uninitialised from `from_pretrained`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from newllm.errors import UserError, nearest
from newllm.ops import reference


@dataclass(frozen=True)
class NoPosition:
    """NoPE: order is known from causality alone."""

    type: Literal["none"] = "none"

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """heads (B, N, T, d), queries or keys at positions (B, T), as they are."""
        return heads

    def reference_rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """The naive twin of `rotate`."""
        return heads

    def head_slopes(self, num_heads: int, device: torch.device) -> Tensor | None:
        """The ALiBi slopes: None, there is no bias."""
        return None


@dataclass(frozen=True)
class RotaryPosition(NoPosition):
    """Rotary position embedding (arXiv 2104.09864) on the first `fraction` of each head, as in GPT-NeoX and Pythia."""

    type: Literal["rope"] = "rope"  # type: ignore[assignment]
    fraction: float = 0.25
    base: float = 10000.0

    def rotary_dim(self, head_size: int) -> int:
        """Rotated dimensions of each head: even, as they turn in pairs."""
        return max(2, int(head_size * self.fraction) // 2 * 2)

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Rotates heads (B, N, T, d) by their positions (B, T), in float32 at least."""
        rotary_dim = self.rotary_dim(heads.shape[-1])
        cos, sin = self._table(positions, rotary_dim, torch.promote_types(heads.dtype, torch.float32))
        part, rest = heads.split([rotary_dim, heads.shape[-1] - rotary_dim], dim=-1)
        turned = part * cos + part.roll(rotary_dim // 2, dims=-1) * sin
        return torch.cat([turned.to(heads.dtype), rest], dim=-1)

    def reference_rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        return reference.rope(heads, positions, self.rotary_dim(heads.shape[-1]), self.base)

    def _table(self, positions: Tensor, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`_make_table`, kept on the positions, as all layers share them."""
        if torch.compiler.is_compiling():  # a compiler cannot follow this, and finds by itself what is made twice
            return self._make_table(positions, rotary_dim, dtype)
        tables = positions.__dict__.setdefault("_rope_tables", {})
        version = 0 if positions.is_inference() else positions._version  # a change in place makes the table stale
        key = (rotary_dim, self.base, dtype, version)
        if key not in tables:
            tables[key] = self._make_table(positions, rotary_dim, dtype)
        return tables[key]

    def _make_table(self, positions: Tensor, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (−sin, sin) of positions (B, T), each (B, 1, T, rotary_dim)."""
        steps = torch.arange(0, rotary_dim, 2, dtype=dtype, device=positions.device)
        angles = positions[:, None, :, None].to(dtype) * (1.0 / self.base ** (steps / rotary_dim))
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@dataclass(frozen=True)
class AlibiPosition(NoPosition):
    """Attention with linear biases (arXiv 2108.12409): the score of a key at distance i − j gets −m_h·(i − j).

    `uniform`: one slope for every head. At the default of 1/16 a key 128 tokens back loses 8 nats: such a model is in
    effect local. `geometric`: the paper's m_h = 2^(−8h/H), h = 1 … H, from local to nearly global heads.
    """

    type: Literal["alibi"] = "alibi"  # type: ignore[assignment]
    slopes: Literal["uniform", "geometric"] = "uniform"
    slope: float = 0.0625

    def head_slopes(self, num_heads: int, device: torch.device) -> Tensor:
        """(1,) for the uniform, (num_heads,) for the geometric scheme; float32, nats per token."""
        if self.slopes == "uniform":
            return torch.full((1,), self.slope, device=device)
        heads = torch.arange(1, num_heads + 1, device=device, dtype=torch.float32)
        return torch.exp2(-8 * heads / num_heads)


Position = NoPosition
POSITIONS: dict[str, type[NoPosition]] = {"none": NoPosition, "rope": RotaryPosition, "alibi": AlibiPosition}


def create_position(spec: str | dict[str, Any], head_size: int | None = None) -> Position:
    """From a name ('rope', 'alibi', 'none') or a spec such as {'type': 'alibi', 'slopes': 'geometric'}.

    Raises UserError for an unknown type, option or value, naming the nearest valid one, and for heads of a size it
    cannot turn.
    """
    options: dict[str, Any] = {"type": spec} if isinstance(spec, str) else dict(spec)
    kind = str(options.pop("type", "none"))
    if kind not in POSITIONS:
        raise nearest(kind, list(POSITIONS), "position encoding")
    valid = [field.name for field in fields(POSITIONS[kind])]
    for name in options:
        if name not in valid:
            raise nearest(name, valid, "option", f"of position '{kind}'")
    scheme = options.get("slopes", "uniform")
    if scheme not in ("uniform", "geometric"):
        raise nearest(str(scheme), ["uniform", "geometric"], "ALiBi slope scheme")
    for name in ("fraction", "base", "slope"):
        if name in options and not (type(options[name]) in (int, float) and 0 < options[name] < math.inf):
            raise UserError(f"position option {name} is {options[name]!r}: it must be a finite number greater than 0")
    if scheme == "geometric" and options.get("slope", AlibiPosition.slope) != AlibiPosition.slope:
        raise UserError(f"position option slope is {options['slope']!r}: it is that of slopes=uniform, leave it out")
    if options.get("fraction", 1) > 1:
        raise UserError(f"position option fraction is {options['fraction']}: at most 1, the whole head")
    if kind == "rope" and head_size is not None and head_size < 2:
        raise UserError(
            f"position 'rope' turns pairs of numbers, and a head has {head_size}: choose fewer heads, or position=alibi"
        )
    return POSITIONS[kind](**options)


def position_spec(position: Position) -> dict[str, Any]:
    """The complete spec of a position encoding, as it stands in a config file."""
    return asdict(position)
