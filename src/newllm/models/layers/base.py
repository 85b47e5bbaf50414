"""The one contract every layer type keeps, and the registry that finds layer types by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from newllm.errors import UserError, first_line, nearest
from newllm.models.cache import LayerState
from newllm.models.linear import Linear

LAYER_TYPES: dict[str, type[Layer]] = {}
PRESETS_FOLDER = Path(__file__).parents[1] / "presets"
PLUGIN_PRESETS: dict[str, dict[str, Any]] = {}
"""Presets beside those of the folder: `factory.register_preset`."""

L = TypeVar("L", bound="type[Layer]")


def register_layer(name: str) -> Callable[[L], L]:
    """Class decorator: makes a layer type available to configs, presets and the command line under `name`.

    Raises UserError for a class that is no Layer, and for a name that a layer type or a preset has.
    """

    def register(cls: L) -> L:
        if not (isinstance(cls, type) and issubclass(cls, Layer)):
            raise UserError(f"@register_layer('{name}') needs a subclass of Layer, which {cls.__qualname__} is not")
        if name in LAYER_TYPES and LAYER_TYPES[name].__qualname__ != cls.__qualname__:
            raise UserError(f"layer type '{name}' is already taken by {LAYER_TYPES[name].__qualname__}: choose another")
        # Our own layer types share names with presets of theirs; of another's layer the preset would be taken.
        ours = cls.__module__.startswith(f"{__package__}.")
        if not ours and ((PRESETS_FOLDER / f"{name}.yaml").is_file() or name in PLUGIN_PRESETS):
            raise UserError(f"layer type '{name}': a preset has that name already: choose another")
        cls.type_name = name
        LAYER_TYPES[name] = cls
        return cls

    return register


class Layer(nn.Module):
    """One residual layer: token mixer and MLP, (B, T, D) to (B, T, D).

    A subclass's __init__ takes (hidden_size, num_heads, intermediate_size, **options), every option JSON-able; its
    arguments are remembered as the layer's spec, from which the model's config is derived.
    """

    type_name: ClassVar[str] = ""
    # Sets of options under which the contract is checked, beside the defaults.
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Layer:
        layer = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(layer, *args, **kwargs)
        bound.apply_defaults()
        # Past nn.Module.__setattr__, which needs Module.__init__ to have run.
        object.__setattr__(layer, "_arguments", dict(list(bound.arguments.items())[1:]))
        return layer

    def forward(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, state: LayerState | None) -> Tensor:
        """One chunk of T ≥ 1 tokens.

        Args:
            x: (B, T, D) residual stream.
            positions: (B, T) token positions, counted from 0 at each row's first real token.
            mask: (B, S) bool over all S tokens the state has read, this chunk's T last; True for real tokens, False
                for padding, which may stand anywhere in a row and leaves its state as it is. None if all are real.
            state: what `make_state` returned, advanced by this call; None for a whole sequence at once.

        Returns:
            (B, T, D). Row b depends on row b alone, token t on tokens ≤ t alone, real tokens on no padding.
        """
        raise NotImplementedError

    def make_state(self) -> LayerState:
        """An empty state for this layer."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initial values of bare parameters, through torch.nn.init; the model has already initialised every Linear,
        Embedding and LayerNorm, whose values may be replaced here."""

    def reconstruction_parameters(self) -> list[nn.Parameter]:
        """What is trained on `reconstruction_loss` before the language model is, and then frozen; mostly nothing."""
        return []

    def reconstruction_loss(self, x: Tensor) -> Tensor:
        """What the first phase of training minimises, of every token of x (B, T, D): (B, T), in float32 at least."""
        raise NotImplementedError

    def gate_parameters(self) -> list[nn.Parameter]:
        """Parameters that learn at a rate of their own (`gate_lr`), without weight decay; mostly none."""
        return []

    def reference(self, x: Tensor, *, positions: Tensor, mask: Tensor | None) -> Tensor:
        """The naive twin of `forward` without state: the same weights, formulas instead of speed."""
        raise NotImplementedError

    def state_bytes(self, tokens: int, element_size: int) -> int:
        """Closed form of the bytes one row's state holds after `tokens` tokens, at `element_size` bytes a number."""
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """Type and arguments, complete: `create_layer(layer.spec)` builds the same layer."""
        return {"type": self.type_name, **self._arguments}

    @classmethod
    def option_names(cls) -> list[str]:
        """Options beyond hidden_size, num_heads and intermediate_size."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *SHAPE)]


SHAPE = ("hidden_size", "num_heads", "intermediate_size")


def create_layer(spec: dict[str, Any]) -> Layer:
    """Builds a layer from its spec. Raises UserError naming the nearest valid type or option."""
    options = dict(spec)
    cls = layer_type(options.pop("type"))
    for name in options:
        if name not in SHAPE and name not in cls.option_names():
            raise nearest(name, cls.option_names(), "option", f"of layer type '{cls.type_name}'")
    try:
        return cls(**options)
    except UserError:
        raise
    except Exception as error:  # a plugin's constructor may raise anything
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"layer type '{cls.type_name}' cannot be built: {what}") from error


def layer_type(name: str) -> type[Layer]:
    """The layer class of that name. Raises UserError naming the nearest valid one."""
    if name not in LAYER_TYPES:
        raise nearest(name, list(LAYER_TYPES), "layer type")
    return LAYER_TYPES[name]


class MLP(nn.Module):
    """Linear, GELU, Linear; (…, D) to (…, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))
