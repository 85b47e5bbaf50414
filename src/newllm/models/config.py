"""The configuration of a model: a list of layer specs, as a Hugging Face config."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from newllm.errors import UserError, nearest
from newllm.models.cache import check_precision

IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}
# What Hugging Face writes into config.json beside the fields.
BOOKKEEPING = ("model_type", "transformers_version", "torch_dtype", "attn_implementation")


class LMConfig(PreTrainedConfig):
    """Configuration of `TransformerLM`.

    Args:
        vocab_size: words V.
        hidden_size: width D of the residual stream.
        layer_specs: one dict a layer, its `type` and arguments: {'type': 'pythia', 'hidden_size': 512, …}. (Not
            `layer_types`: transformers validates that name against its own layers.)
        tie_word_embeddings: share the input embedding with the output head.
        layer_norm_eps: epsilon of the final LayerNorm.
        initializer_range: standard deviation of the initial weights.
        embedding_std: that of the initial embeddings; None for initializer_range (`ContextVectorLM`: 1). What GPT-2's
            residual adds to embeddings before an MLP reads them drowns small ones (docs/pythia.md). Where
            the head shares them, its own too.
        cache_precision: how caches store what grows with the text: 'model' (in the dtype it is computed in), 'int8' or
            'int4', see `ops.quantize`.

    Raises:
        UserError: for an unknown option (transformers would take it silently), one of another type, or cache_precision.
    """

    model_type = "newllm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (a class attribute transformers defines this way)

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 0
    layer_specs: list[dict[str, Any]] = field(default_factory=list)
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    embedding_std: float | None = None
    use_cache: bool = True
    cache_precision: str = "model"
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_hidden_layers = len(self.layer_specs)
        for name in kwargs:
            if name not in BOOKKEEPING and not name.startswith("_"):
                raise nearest(name, self.option_names(), "option", f"of {type(self).__name__}")
        self._check_types()
        check_precision(self.cache_precision)
        super().__post_init__(**kwargs)

    def _check_types(self) -> None:
        """Raises UserError for a number or switch that is none. (Who uses a name knows the valid ones.)"""
        for name in self.option_names():
            value, kind = getattr(self, name), type(getattr(type(self), name, None))
            if name == "embedding_std" and value is not None:
                kind = float
            fits = type(value) is kind or (kind is float and type(value) is int)
            if kind in IN_WORDS and not fits:
                raise UserError(f"{name} is {value!r}: it must be {IN_WORDS[kind]}")
        for name in ("layer_norm_eps", "initializer_range", "embedding_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}: it must be at least 0")

    @property
    def std_of_embeddings(self) -> float:
        """Standard deviation of the initial embeddings."""
        return self.initializer_range if self.embedding_std is None else self.embedding_std

    @classmethod
    def option_names(cls) -> list[str]:
        """The fields that this project gives a configuration: those of LMConfig, and a subclass's own."""
        own = (base for base in cls.__mro__ if issubclass(base, LMConfig))
        return [name for base in own for name in base.__annotations__ if name != "model_type"]
