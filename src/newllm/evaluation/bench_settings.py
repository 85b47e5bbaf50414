"""What `newllm bench` can be told; no torch here, so that --help stays quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from newllm.evaluation.rivals import NAMES, Rival
from newllm.settings import Precision, UserError, nearest


@dataclass(kw_only=True)
class BenchSettings:
    """What the benchmarks share; the default shape is Pythia-70M's."""

    models: list[str] = field(default_factory=lambda: ["pythia", "gqa", "mqa", "mla", "v_dproj"])
    """Presets or layer types of this project to measure, with options as in mla:cache_precision=int8."""
    rivals: list[Rival] = field(default_factory=lambda: ["gpt_neox", "gpt_neox_static", "deepseek_v3"])
    """Models of Hugging Face in the matching shape to measure beside them."""
    kv_lora_rank: int = 128
    """Numbers of the latent that deepseek_v3 caches of a token; the default is that of our mla."""
    hidden_size: int = 512
    """Width D of the residual stream."""
    num_layers: int = 6
    """Number of layers."""
    num_heads: int = 8
    """Number of attention heads."""
    intermediate_size: int = 2048
    """Width of the MLP."""
    vocab_size: int = 50304
    """Words of the vocabulary."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    device: str = "auto"
    """'auto' is cuda where there is one, else cpu."""

    def shape(self) -> dict[str, int]:
        """The arguments of `create_model` that give a model this shape."""
        names = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def subjects(self, max_positions: int) -> list[dict[str, Any]]:
        """What `worker.build_model` needs to build the rivals and then the models."""
        options = {"max_positions": max_positions, "kv_lora_rank": self.kv_lora_rank}
        rivals = [{"rival": rival} | options | self.shape() for rival in self.rivals]
        return rivals + [{"model": model} | self.shape() for model in self.models]

    def check(self) -> None:
        """Raises UserError for a value out of range or an unknown model or rival, before anything starts."""
        for name, value in asdict(self).items():
            flag = f"--{name.replace('_', '-')}"
            if value == [] and name != "rivals":  # ours may also be measured alone
                raise UserError(f"{flag} is empty: it must have at least one value")
            least = 0 if name == "warmup" else 1
            for number in value if isinstance(value, list) else [value]:
                if type(number) is int and number < least:
                    raise UserError(f"{flag} is {value}: it must be at least {least}")
                if type(number) is float and number <= 0:
                    raise UserError(f"{flag} is {value}: it must be more than 0")
        for flag, names in (("--models", self.models), ("--rivals", self.rivals)):
            if len(set(names)) < len(names):  # rows are told apart by these names
                raise UserError(f"{flag} names a model twice: {' '.join(names)}")
        from newllm.models import check_model_spec

        for rival in self.rivals:
            if rival not in NAMES:
                raise nearest(rival, list(NAMES), "rival", "in --rivals")
        for model in self.models:
            check_model_spec(model, **self.shape())


@dataclass(kw_only=True)
class TrainBench(BenchSettings):
    """`newllm bench train`."""

    models: list[str] = field(default_factory=lambda: ["pythia", "mla", "v_dproj"])
    """Presets or layer types of this project to measure; speed is also given towards the first."""
    rivals: list[Rival] = field(default_factory=lambda: ["gpt_neox"])
    """Models of Hugging Face in the matching shape to measure beside them."""
    batch_size: int = 8
    """Windows in a batch."""
    seq_lengths: list[int] = field(default_factory=lambda: [128, 512])
    """Tokens of a window; one case for each."""
    rounds: int = 5
    """Rounds; in each, every model works once."""
    warmup: int = 1
    """Steps at the start of a model's turn that are not counted."""
    steps: int = 2
    """Training steps of a model's turn."""
    precision: Precision = "auto"
    """'auto' is bf16 autocast where the device computes it natively, else float32."""


@dataclass(kw_only=True)
class DecodeBench(BenchSettings):
    """`newllm bench decode`."""

    contexts: list[int] = field(default_factory=lambda: [2048, 8192, 32768])
    """Tokens in the cache when decoding begins; a case for each, with each batch size."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    """Rows that are decoded together."""
    rounds: int = 3
    """Rounds; in each, every model works once in each precision."""
    warmup: int = 3
    """Tokens at the start of a model's turn that are not counted."""
    steps: int = 32
    """Tokens of a model's turn, at most."""
    seconds: float = 0.5
    """A turn ends after this time even with fewer tokens, and so does its warm-up, but neither before the first."""
    fill_chunk: int = 256
    """Tokens that are read to fill a cache; what they leave in it is repeated up to the context."""
    ceiling_megabytes: int = 1024
    """Buffer for measuring the memory bandwidth: many times the processor's last cache."""
    all_precisions: bool = False
    """Show every model in bf16 and in float32, not only in the faster of the two."""


@dataclass(kw_only=True)
class MemoryBench(BenchSettings):
    """`newllm bench memory`."""

    contexts: list[int] = field(default_factory=lambda: [2048, 8192, 32768])
    """Tokens in the cache when decoding ends; a case for each."""
    steps: int = 8
    """Tokens decoded at the end of each context, while the peak is measured."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and cache."""
    fill_chunk: int = 256
    """Tokens that are read to fill a cache; what they leave in it is repeated up to the context."""

    def check(self) -> None:
        super().check()
        if min(self.contexts) <= self.steps:
            raise UserError(f"--contexts is {self.contexts}: each must be more than --steps {self.steps}")
