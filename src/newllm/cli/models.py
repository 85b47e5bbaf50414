"""Commands that train models, measure them and let them speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from newllm.cli.registry import PLACE, command
from newllm.paths import user_path
from newllm.resolution import resolve
from newllm.settings import (
    CONFIGS_FOLDER,
    DataSettings,
    EvaluationSettings,
    ExperimentSettings,
    RunSettings,
    ShapeSettings,
)

if TYPE_CHECKING:
    from newllm.commands.flags import Parser


@command(
    "compare",
    "newllm compare --models pythia pythia_alibi gqa mqa",
    "newllm compare --models pythia gqa:num_kv_heads=1,window=128 --scale small --seeds 0 1 2 --out runs/windows",
    "newllm compare --data my_texts/ --max-tokens 2000000 --lr 5e-4",
    "newllm compare --plugin my_layer.py --models pythia my_layer",
    "newllm compare --scale small --print_config > my.yaml && newllm compare --config my.yaml",
    configs=CONFIGS_FOLDER,
)
def compare(parser: Parser, argv: list[str]) -> int:
    """Train several models under the same budget and write one report."""
    parser.add_settings(ExperimentSettings)
    return _compare(parser.settings(parser.parse(argv), complete=resolve))


def _compare(settings: ExperimentSettings) -> int:
    from newllm.experiments.compare import compare as run
    from newllm.experiments.results import read_results
    from newllm.experiments.run import RunError

    try:
        report = run(settings)
    except RunError as error:
        print(f"newllm: error: {error}", file=sys.stderr)
        return 1
    here = Path.cwd()
    print(f"report: {report.relative_to(here) if report.is_relative_to(here) else report}")
    return 1 if read_results(report.parent)["failed"] else 0


@command(
    "adapt",
    "newllm adapt runs/pythia-small-0 --max-tokens 500000",
    "newllm adapt runs/pythia-small-0 --models pythia mla_geometric mla_geometric:kv_dim=64 --seeds 0 1 2",
    "newllm adapt runs/pythia-small-0 --models pythia infini_adapter",
    "newllm adapt pythia-70m/ --data my_texts/ --models pythia mla --max-tokens 2000000",
    usage="FOLDER",
    configs=CONFIGS_FOLDER,
)
def adapt(parser: Parser, argv: list[str]) -> int:
    """Put a trained model into other layers, train on, and compare with training the model on as it is."""
    from newllm.commands import adapt as command

    parser.add_argument("folder", metavar="FOLDER", help="Run folder, or a model folder of newllm or GPT-NeoX.")
    parser.add_settings(command.AdaptSettings)
    folder = parser.parse(argv).folder
    settings = parser.settings(parser.parse(argv, command.settings_for(folder)), complete=resolve)
    return _compare(ExperimentSettings(**vars(settings)))


@command(
    "train",
    "newllm train --model gqa --out runs/gqa",
    "newllm train --model pythia:position=none --scale small --seed 1",
    "newllm train --model mqa --data my.txt --tokenizer EleutherAI/pythia-70m --epochs 3",
)
def train(parser: Parser, argv: list[str]) -> None:
    """Train one model; started again, it continues where it was."""
    parser.add_settings(RunSettings)
    parser.add_argument("--out", metavar="DIR", help="Run folder (default: runs/MODEL-SCALE-SEED).")
    arguments = parser.parse(argv)
    settings = parser.settings(arguments, complete=resolve)
    from newllm.commands.train import train as run

    run(settings, arguments.out)


@command(
    "evaluate",
    "newllm evaluate runs/gqa",
    "newllm evaluate runs/gqa --tasks perplexity efficiency",
    "newllm evaluate runs/gqa --cache-precision model int8 int4",
    "newllm evaluate runs/infini --tasks recall --recall-distances 1 4 16",
    "newllm evaluate runs/gqa --data other.txt --test-share 0.9 --sliding-window 1024 --sliding-stride 128",
    usage="FOLDER",
)
def evaluate(parser: Parser, argv: list[str]) -> int:
    """Measure a trained model again: perplexity on its own text or another, recall, speed and memory."""
    from newllm.commands import evaluate as run

    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="Run folder, whose settings are the defaults, or a folder with config.json and weights.",
    )
    parser.add_argument("--tasks", nargs="+", default=["perplexity"], metavar="TASK", help=" ".join(run.TASKS))
    parser.add_argument(
        "--cache-precision",
        nargs="+",
        default=[],
        metavar="model|int8|int4",
        help="Measure perplexity through caches of these precisions, side by side (default: without a cache).",
    )
    recall = ("recall_segment", "recall_distances", "recall_facts", "recall_windows")
    parser.add_settings(RunSettings, (DataSettings, EvaluationSettings, *recall, *PLACE, "precision"))
    arguments = parser.parse(argv)
    folder = user_path(arguments.folder)
    base = run.settings_of(folder, arguments.tasks)
    settings = parser.settings(parser.parse(argv, vars(base)), base)
    results = run.evaluate(folder, arguments.tasks, settings, arguments.cache_precision)
    run.print_results(results)
    return 1 if results.get("efficiency", {}).get("efficiency_error") else 0


@command(
    "generate",
    'newllm generate runs/gqa --prompt "To be, or not" --max-new-tokens 300',
    "newllm generate runs/gqa                        a conversation; an empty line ends it",
    "newllm generate runs/gqa --temperature 0 < beginning.txt",
    usage="MODEL",
)
def generate(parser: Parser, argv: list[str]) -> None:
    """Continue a text with a trained model, or with any preset untrained, as it comes."""
    from newllm.commands.generate import GenerateSettings
    from newllm.commands.generate import generate as run

    parser.add_argument(
        "model", metavar="MODEL", help="Run folder, model folder, or a preset (shape and data are for these)."
    )
    chosen = (GenerateSettings, DataSettings, ShapeSettings, "seed", "scale", *PLACE)
    parser.add_settings(GenerateSettings, chosen)
    arguments = parser.parse(argv)
    run(parser.settings(arguments, GenerateSettings(model=arguments.model)))


@command(
    "models",
    "newllm models                    all of them, in a line each",
    "newllm models mla:kv_dim=64      its layers, its size, its options and what they mean",
    "newllm models --plugin my_layer.py",
    usage="[MODEL]",
)
def models(parser: Parser, argv: list[str]) -> None:
    """List the models that can be compared, or explain one: layers, size, options."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Preset or layer type, with options if you like.")
    parser.add_argument("--plugin", metavar="FILE", help="Python file with your own layers.")
    arguments = parser.parse(argv)
    from newllm.commands.models import show

    show(arguments.model, arguments.plugin)


@command("report", "newllm report runs/compare-quickstart", usage="FOLDER")
def report(parser: Parser, argv: list[str]) -> None:
    """Write report.html and report.md again from results.json."""
    parser.add_argument("folder", metavar="FOLDER", help="Folder of a comparison.")
    arguments = parser.parse(argv)
    from newllm.experiments.report import write_report

    print(f"report: {write_report(user_path(arguments.folder))}")


@command(
    "check",
    "newllm check runs/gqa",
    "newllm check --plugin my_layer.py",
    "newllm check --models pythia gqa:window=16",
    usage="[MODEL]",
)
def check(parser: Parser, argv: list[str]) -> int:
    """Check that a model, or your own layer, keeps the contract: causal, rows apart, cache = forward, …"""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Run folder or model folder.")
    parser.add_argument("--plugin", metavar="FILE", help="Python file with your own layers; all of them are checked.")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="MODEL", help="Presets or layer types to check instead."
    )
    arguments = parser.parse(argv)
    from newllm.commands.check import check as run

    return 0 if run(arguments.model, arguments.plugin, arguments.models) else 1
