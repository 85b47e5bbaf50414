"""The benchmarks: commands that differ only in their settings and in what measures them."""

from __future__ import annotations

from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple

from newllm.cli.registry import Command, register

if TYPE_CHECKING:
    from newllm.commands.flags import Parser


class Bench(NamedTuple):
    about: str
    settings: str
    """MODULE:NAME of the dataclass, imported when the benchmark is chosen."""
    run: str
    """MODULE:NAME of the function that takes the settings, measures and prints."""
    examples: tuple[str, ...]


BENCHES = {
    "train": Bench(
        "Training speed and memory against Hugging Face's GPT-NeoX in the same shape.",
        "newllm.bench.settings:TrainBench",
        "newllm.commands.bench:run",
        ("newllm bench train", "newllm bench train --models pythia gqa --seq-lengths 512 --rounds 3"),
    ),
    "decode": Bench(
        "Decoding latency against Hugging Face's models in the same shape, and against the memory bandwidth.",
        "newllm.bench.settings:DecodeBench",
        "newllm.commands.bench:run",
        (
            "newllm bench decode",
            "newllm bench decode --models pythia mla mla:cache_precision=int8 --contexts 8192 --batch-sizes 1",
            "newllm bench decode --models pythia --rivals gpt_neox --rounds 9 --all-precisions true",
        ),
    ),
    "memory": Bench(
        "Peak memory and cache bytes per token while decoding, beside Hugging Face's models in the same shape.",
        "newllm.bench.settings:MemoryBench",
        "newllm.commands.bench:run",
        (
            "newllm bench memory",
            "newllm bench memory --models pythia mla mla:cache_precision=int4 --contexts 32768",
        ),
    ),
    "reading": Bench(
        "The forward of one compressive layer against the same as a cumulative sum, and against attention.",
        "newllm.bench.settings:ReadingBench",
        "newllm.commands.bench:run",
        (
            "newllm bench reading",
            "newllm bench reading --num-heads 1 --rival-gigabytes 18 --rounds 3",
            "newllm bench reading --layers infini:local=linear,use_delta_rule=false multi_memory pythia --num-heads 8",
        ),
    ),
    "growth": Bench(
        "State bytes, decoding time and memory while models read a long text.",
        "newllm.bench.settings:GrowthBench",
        "newllm.commands.bench:run",
        (
            "newllm bench growth --plot growth.html",
            "newllm bench growth --models pythia infini_all infini_all:memory_head_dim=64 --marks 1000 10000 100000",
        ),
    ),
    "lagged": Bench(
        "Training of models that feed a state back: Lagged Cache Training against step by step.",
        "newllm.bench.lagged_settings:LaggedBench",
        "newllm.commands.bench_lagged:run",
        (
            "newllm bench lagged",
            "newllm bench lagged --model continuous --methods step_by_step lagged lagged:deep_share=0.1,deep_passes=4",
            "newllm bench lagged --quality true --quality-samples 2000 --seeds 0 1 2",
        ),
    ),
    "vintix": Bench(
        "A step of the Vintix engine, whose keys and values lie in a ring, against reading the context again.",
        "newllm.vintix.settings:VintixBench",
        "newllm.commands.vintix:bench",
        ("newllm bench vintix", "newllm bench vintix --context 8192 --environments 1 --rounds 1"),
    ),
}


def run(bench: Bench, parser: Parser, argv: list[str]) -> None:
    parser.add_settings(resolve_name(bench.settings))
    settings = parser.settings(parser.parse(argv))
    resolve_name(bench.run)(settings)


for _name, _bench in BENCHES.items():
    register(Command(f"bench {_name}", _bench.about, partial(run, _bench), _bench.examples))
