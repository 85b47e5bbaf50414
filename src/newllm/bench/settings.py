"""What `newllm bench` can be told; no torch here, so that --help stays quick."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from newllm.bench.rivals import NAMES, Rival
from newllm.errors import UserError, flag, nearest
from newllm.paths import user_path
from newllm.settings import Precision


@dataclass(kw_only=True)
class LayerBench:
    """The shape of a layer, by default one of Pythia-70M, and the machine."""

    hidden_size: int = 512
    """Width D of the residual stream."""
    intermediate_size: int = 2048
    """Width of the MLP."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    device: str = "auto"
    """'auto' is cuda where there is one, else cpu."""

    def check(self) -> None:
        """Raises UserError for a value out of range, before anything starts."""
        for name, value in asdict(self).items():
            if value == [] and name not in ("rivals", "quality_untimed"):  # ours may also be measured alone
                raise UserError(f"{flag(name)} is empty: it must have at least one value")
            least = 0 if name == "warmup" else 1
            for number in value if isinstance(value, list) else [value]:
                if type(number) is int and number < least:
                    raise UserError(f"{flag(name)} is {value}: it must be at least {least}")
                if type(number) is float and number <= 0:
                    raise UserError(f"{flag(name)} is {value}: it must be more than 0")


@dataclass(kw_only=True)
class ShapeBench(LayerBench):
    """The shape of a model; the default is Pythia-70M's."""

    num_layers: int = 6
    """Number of layers."""
    num_heads: int = 8
    """Number of attention heads."""
    vocab_size: int = 50304
    """Words of the vocabulary."""

    def shape(self) -> dict[str, Any]:
        """The arguments of `create_model` that give a model this shape."""
        names = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class ModelBench(ShapeBench):
    """The models."""

    models: list[str] = field(default_factory=lambda: ["pythia", "gqa", "mqa", "mla", "v_dproj"])
    """Presets or layer types of this project to measure, with options as in mla:cache_precision=int8."""

    def check(self) -> None:
        """Also for an unknown model."""
        super().check()
        from newllm.models import meta_model

        refuse_twice("--models", self.models)
        for model in self.models:
            meta_model(model, **self.shape())


@dataclass(kw_only=True)
class BenchSettings(ModelBench):
    """The rivals."""

    rivals: list[Rival] = field(default_factory=lambda: ["gpt_neox", "gpt_neox_static", "deepseek_v3"])
    """Models of Hugging Face in the matching shape to measure beside them."""
    kv_lora_rank: int = 128
    """Numbers of the latent that deepseek_v3 caches of a token; the default is that of our mla."""

    def subjects(self, max_positions: int) -> list[dict[str, Any]]:
        """What `worker.build_subject` makes the rivals and then the models of."""
        options = {"max_positions": max_positions, "kv_lora_rank": self.kv_lora_rank}
        rivals = [{"rival": rival} | options | self.shape() for rival in self.rivals]
        return rivals + [{"model": model} | self.shape() for model in self.models]

    def check(self) -> None:
        """Also for an unknown rival."""
        super().check()
        refuse_twice("--rivals", list(self.rivals))
        for rival in self.rivals:
            if rival not in NAMES:
                raise nearest(rival, list(NAMES), "rival", "in --rivals")


def check_plot(path: str | None) -> None:
    """Raises UserError if a plot could not be written there."""
    if path is not None and not (path.endswith(".html") and user_path(path).parent.is_dir()):
        raise UserError(f"--plot is '{path}': it must be an .html file in a folder that exists")


def refuse_twice(flag: str, names: list[str]) -> None:
    """Raises UserError if a name is there twice: rows are told apart by their names."""
    if len(set(names)) < len(names):
        raise UserError(f"{flag} names a model twice: {' '.join(names)}")


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
    without_kernels: bool = False
    """Also measure each model with torch's operators in place of the project's own kernels."""

    def subjects(self, max_positions: int) -> list[dict[str, Any]]:
        """Also the models without our kernels."""
        without = [{"model": model, "kernels": False} | self.shape() for model in self.models]
        return super().subjects(max_positions) + (without if self.without_kernels else [])

    def check(self) -> None:
        """Also for windows in which nothing is to be predicted."""
        super().check()
        if min(self.seq_lengths) < 2:
            raise UserError(f"--seq-lengths is {self.seq_lengths}: a window must have at least 2 tokens")


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


@dataclass(kw_only=True)
class ReadingBench(LayerBench):
    """`newllm bench reading`."""

    layers: list[str] = field(default_factory=lambda: ["infini:local=linear", "infini:local=softmax", "pythia"])
    """Layer types to measure, with options. The first is an infini layer with linear attention within segments, which
    is also measured written as a cumulative sum of outer products."""
    num_heads: list[int] = field(default_factory=lambda: [8, 1])
    """Attention heads H; a case for each. A product of a key and a value has D²/H numbers."""
    batch_size: int = 8
    """Rows of embeddings in a batch."""
    seq_length: int = 2048
    """Tokens of a row."""
    rival_gigabytes: float = 8.0
    """Most memory the cumulative sum may need. Where it needs more, all are also measured with as few rows as fit."""
    rounds: int = 5
    """Rounds; in each, every layer works once."""
    warmup: int = 1
    """Forward passes at the start of a layer's turn that are not counted."""
    steps: int = 2
    """Forward passes of a layer's turn."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of weights and embeddings."""

    def spec(self, layer: str, num_heads: int) -> dict[str, Any]:
        """The spec of one of `layers`."""
        from newllm.models.factory import parse_model

        name, options = parse_model(layer)
        shape = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        return {"type": name, "num_heads": num_heads} | shape | options

    def rival_rows(self, num_heads: int) -> int:
        """Rows that fit into `rival_gigabytes`: of each token one sum of products, D²/H numbers in float32."""
        row = self.seq_length * self.hidden_size**2 // num_heads * 4
        return min(self.batch_size, int(self.rival_gigabytes * 1e9 // row))

    def check(self) -> None:
        """Also for layers that cannot be built, a first one that is of another kind, and sums that do not fit."""
        super().check()
        refuse_twice("--layers", self.layers)
        import torch

        from newllm.models.layers import create_layer

        for num_heads in self.num_heads:
            with torch.device("meta"):
                first, *_ = [create_layer(self.spec(layer, num_heads)) for layer in self.layers]
            if first.spec.get("local") != "linear":
                raise UserError(f"--layers begins with '{self.layers[0]}': it must be as in infini:local=linear")
            if not self.rival_rows(num_heads):
                raise UserError(
                    f"--rival-gigabytes is {self.rival_gigabytes:g}: the cumulative sum needs more for a single row of "
                    f"{self.seq_length} tokens and {num_heads} heads; give more, or a shorter --seq-length"
                )


@dataclass(kw_only=True)
class GrowthBench(ModelBench):
    """`newllm bench growth`."""

    models: list[str] = field(
        default_factory=lambda: [
            *("pythia", "sliding_window", "mla"),
            *("infini", "infini:window=128", "infini_all", "multi_memory:window=128"),
        ]
    )
    """Presets or layer types of this project to measure, with options as in mla:cache_precision=int8."""
    marks: list[int] = field(default_factory=lambda: [1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000])
    """Tokens after which a model is measured; it reads up to the last."""
    rounds: int = 3
    """Rounds at each mark; in each, every model decodes once."""
    warmup: int = 3
    """Tokens at the start of a model's turn that are not counted."""
    steps: int = 128
    """Tokens of a model's turn; in as many as a segment has, one segment is written."""
    chunk: int = 256
    """Tokens that are read at a time."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and state; memories are in float32 either way."""
    plot: str | None = None
    """HTML file for a plot of state bytes and decoding time against tokens read."""

    def check(self) -> None:
        """Also for marks too close to each other, and a plot that could not be written."""
        super().check()
        check_plot(self.plot)
        decoded = self.rounds * (self.warmup + self.steps)
        for before, mark in itertools.pairwise([0, *sorted(self.marks)]):
            if mark - before <= decoded:
                raise UserError(
                    f"--marks is {self.marks}: before each there must be more than the {decoded} tokens that --rounds, "
                    "--warmup and --steps decode"
                )
