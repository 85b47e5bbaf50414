"""The command line: one function for each command. torch is imported only by the command that needs it.

Exit codes: 0 done, 1 a check failed or something unforeseen, 2 wrong input (one line: what, and what would be valid),
130 interrupted (state saved).
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from newllm import __version__
from newllm.settings import UserError, nearest

if TYPE_CHECKING:
    from newllm.commands.flags import Parser
    from newllm.vintix.settings import VintixSettings

OVERVIEW = """\
newllm compares language models that remember differently: same text, same budget, one report.

usage: newllm COMMAND [--help] …

{commands}

examples:
  newllm compare                                  four models on Shakespeare's plays, about five minutes, one report
  newllm compare --models pythia gqa --data my.txt --max-tokens 2000000
  newllm compare --plugin my_layer.py --models pythia my_layer
  newllm train --model gqa --out runs/gqa && newllm generate runs/gqa --prompt "To be"

Every command explains itself: newllm compare --help
"""

# Settings that say how a trained model is opened.
_PLACE = ("plugin", "device", "threads")


def compare(argv: list[str]) -> int:
    """Train several models under the same budget and write one report."""
    parser = _parser(
        "compare",
        compare,
        "newllm compare --models pythia pythia_alibi gqa mqa",
        "newllm compare --models pythia gqa:num_kv_heads=1,window=128 --scale small --seeds 0 1 2 --out runs/windows",
        "newllm compare --data my_texts/ --max-tokens 2000000 --lr 5e-4",
        "newllm compare --plugin my_layer.py --models pythia my_layer",
        "newllm compare --scale small --print_config > my.yaml && newllm compare --config my.yaml",
    )
    from newllm.settings import ExperimentSettings, resolve

    parser.add_settings(ExperimentSettings)
    arguments = parser.parse(argv)
    settings = resolve(parser.settings(arguments))
    if arguments.print_config:
        return _print_config(settings)
    from newllm.experiments.results import read_results
    from newllm.experiments.run import RunError
    from newllm.experiments.runner import compare as run

    try:
        report = run(settings)
    except RunError as error:
        print(f"newllm: error: {error}", file=sys.stderr)
        return 1
    here = Path.cwd()
    print(f"report: {report.relative_to(here) if report.is_relative_to(here) else report}")
    return 1 if read_results(report.parent)["failed"] else 0


def train(argv: list[str]) -> int:
    """Train one model; started again, it continues where it was."""
    parser = _parser(
        "train",
        train,
        "newllm train --model gqa --out runs/gqa",
        "newllm train --model pythia:position=none --scale small --seed 1",
        "newllm train --model mqa --data my.txt --tokenizer EleutherAI/pythia-70m --epochs 3",
    )
    from newllm.settings import RunSettings, resolve

    parser.add_settings(RunSettings)
    parser.add_argument("--out", metavar="DIR", help="Run folder (default: runs/MODEL-SCALE-SEED).")
    arguments = parser.parse(argv)
    settings = resolve(parser.settings(arguments))
    if arguments.print_config:
        return _print_config(settings)
    from newllm.commands.train import train as run

    run(settings, arguments.out)
    return 0


def evaluate(argv: list[str]) -> int:
    """Measure a trained model again: perplexity on its own text or another, recall, speed and memory."""
    parser = _parser(
        "evaluate",
        evaluate,
        "newllm evaluate runs/gqa",
        "newllm evaluate runs/gqa --tasks perplexity efficiency",
        "newllm evaluate runs/gqa --cache-precision model int8 int4",
        "newllm evaluate runs/infini --tasks recall --recall-distances 1 4 16",
        "newllm evaluate runs/gqa --data other.txt --test-share 0.9 --sliding-window 1024 --sliding-stride 128",
        usage="FOLDER",
    )
    from newllm.commands import evaluate as command
    from newllm.settings import DataSettings, EvaluationSettings, RunSettings

    parser.add_argument("folder", metavar="FOLDER", help="Run folder, or a folder with config.json and weights.")
    parser.add_argument("--tasks", nargs="+", default=["perplexity"], metavar="TASK", help=" ".join(command.TASKS))
    parser.add_argument(
        "--cache-precision",
        nargs="+",
        default=[],
        metavar="model|int8|int4",
        help="Measure perplexity through caches of these precisions, side by side (default: without a cache).",
    )
    recall = ("recall_segment", "recall_distances", "recall_facts", "recall_windows")
    parser.add_settings(RunSettings, (DataSettings, EvaluationSettings, *recall, *_PLACE, "precision"))
    arguments = parser.parse(argv)
    base = command.settings_of(Path(arguments.folder), arguments.tasks)
    settings = parser.settings(parser.parse(argv, vars(base)), base)
    if arguments.print_config:
        return _print_config(settings)
    results = command.evaluate(Path(arguments.folder), arguments.tasks, settings, arguments.cache_precision)
    command.print_results(results)
    return 0


def generate(argv: list[str]) -> int:
    """Continue a text with a trained model, or with any preset untrained, as it comes."""
    parser = _parser(
        "generate",
        generate,
        'newllm generate runs/gqa --prompt "To be, or not" --max-new-tokens 300',
        "newllm generate runs/gqa                        a conversation; an empty line ends it",
        "newllm generate runs/gqa --temperature 0 < beginning.txt",
        usage="MODEL",
    )
    from newllm.commands import generate as command
    from newllm.settings import DataSettings, ShapeSettings

    parser.add_argument(
        "model", metavar="MODEL", help="Run folder, model folder, or a preset (shape and data are for these)."
    )
    chosen = (command.GenerateSettings, DataSettings, ShapeSettings, "seed", "scale", "plugin", "device", "threads")
    parser.add_settings(command.GenerateSettings, chosen)
    arguments = parser.parse(argv)
    settings = parser.settings(arguments, command.GenerateSettings(model=arguments.model))
    if arguments.print_config:
        return _print_config(settings)
    command.generate(settings)
    return 0


def report(argv: list[str]) -> int:
    """Write report.html and report.md again from results.json."""
    parser = _parser("report", report, "newllm report runs/compare-quickstart", usage="FOLDER")
    parser.add_argument("folder", metavar="FOLDER", help="Folder of a comparison.")
    arguments = parser.parse(argv)
    from newllm.experiments.report import write_report

    print(f"report: {write_report(Path(arguments.folder))}")
    return 0


def check(argv: list[str]) -> int:
    """Check that a model, or your own layer, keeps the contract: causal, rows apart, cache = forward, …"""
    parser = _parser(
        "check",
        check,
        "newllm check runs/gqa",
        "newllm check --plugin my_layer.py",
        "newllm check --models pythia gqa:window=16",
        usage="[MODEL]",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Run folder or model folder.")
    parser.add_argument("--plugin", metavar="FILE", help="Python file with your own layers; all of them are checked.")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="MODEL", help="Presets or layer types to check instead."
    )
    arguments = parser.parse(argv)
    from newllm.commands.check import check as run

    return 0 if run(arguments.model, arguments.plugin, arguments.models) else 1


def memory_absorb(argv: list[str]) -> int:
    """Read a text into a memory file, which another process or computer can use."""
    parser = _parser(
        "memory absorb",
        memory_absorb,
        "newllm memory absorb runs/infini book.txt --out book.memory",
        "newllm memory absorb runs/infini part2.txt --into book.memory",
        "cat *.txt | newllm memory absorb runs/infini - --out all.memory --window 512",
        usage="MODEL TEXT --out FILE",
    )
    from newllm.commands import memory as command

    parser.add_argument("model", metavar="MODEL", help="Run folder or model folder of a model with memory layers.")
    parser.add_argument("text", metavar="TEXT", help="Text file (UTF-8); - for standard input.")
    parser.add_settings(command.AbsorbSettings, (command.AbsorbSettings, *_PLACE))
    arguments = parser.parse(argv)
    settings = parser.settings(arguments, command.AbsorbSettings(model=arguments.model))
    if arguments.print_config:
        return _print_config(settings)
    command.absorb(settings, arguments.text)
    return 0


def memory_show(argv: list[str]) -> int:
    """Show what a memory file holds: layers, bytes, tokens read, by which model."""
    parser = _parser(
        "memory show",
        memory_show,
        "newllm memory show book.memory",
        "newllm memory show book.memory --model runs/infini",
        usage="FILE",
    )
    from newllm.commands import memory as command
    from newllm.settings import RunSettings

    parser.add_argument("file", metavar="FILE", help="Memory file.")
    parser.add_argument("--model", metavar="MODEL", help="Folder of its model: checks that it fits, shows the gates.")
    parser.add_settings(RunSettings, _PLACE)
    arguments = parser.parse(argv)
    settings = None
    if arguments.model is not None:
        settings = parser.settings(arguments, RunSettings(model=arguments.model))
    command.show(arguments.file, settings)
    return 0


def memory_ask(argv: list[str]) -> int:
    """Continue a prompt with a memory and without it, and tell what the memory knows of the prompt."""
    parser = _parser(
        "memory ask",
        memory_ask,
        'newllm memory ask runs/infini book.memory --prompt "To be, or not"',
        "newllm memory ask runs/infini book.memory --temperature 0 --max-new-tokens 50 < question.txt",
        usage="MODEL FILE --prompt TEXT",
    )
    from newllm.commands import memory as command
    from newllm.commands.generate import GenerateSettings

    parser.add_argument("model", metavar="MODEL", help="Run folder or model folder.")
    parser.add_argument("file", metavar="FILE", help="Memory file that this model wrote.")
    parser.add_settings(GenerateSettings, (GenerateSettings, "seed", *_PLACE))
    arguments = parser.parse(argv)
    settings = parser.settings(arguments, GenerateSettings(model=arguments.model))
    if arguments.print_config:
        return _print_config(settings)
    command.ask(settings, arguments.file)
    return 0


def data_prepare(argv: list[str]) -> int:
    """Read a corpus, train or load its tokenizer, and store the token files that later runs use."""
    return _data("prepare", data_prepare, argv, sample=False)


def data_show(argv: list[str]) -> int:
    """Show what a corpus consists of, how it is split and tokenised, and how its text begins."""
    return _data("show", data_show, argv, sample=True)


def bench_train(argv: list[str]) -> int:
    """Training speed and memory against Hugging Face's GPT-NeoX in the same shape."""
    parser = _parser(
        "bench train",
        bench_train,
        "newllm bench train",
        "newllm bench train --models pythia gqa --seq-lengths 512 --rounds 3",
    )
    from newllm.evaluation.bench_settings import TrainBench

    return _bench(parser, TrainBench, argv)


def bench_decode(argv: list[str]) -> int:
    """Decoding latency against Hugging Face's models in the same shape, and against the memory bandwidth."""
    parser = _parser(
        "bench decode",
        bench_decode,
        "newllm bench decode",
        "newllm bench decode --models pythia mla mla:cache_precision=int8 --contexts 8192 --batch-sizes 1",
        "newllm bench decode --models pythia --rivals gpt_neox --rounds 9 --all-precisions true",
    )
    from newllm.evaluation.bench_settings import DecodeBench

    return _bench(parser, DecodeBench, argv)


def bench_memory(argv: list[str]) -> int:
    """Peak memory and cache bytes per token while decoding, beside Hugging Face's models in the same shape."""
    parser = _parser(
        "bench memory",
        bench_memory,
        "newllm bench memory",
        "newllm bench memory --models pythia mla mla:cache_precision=int4 --contexts 32768",
    )
    from newllm.evaluation.bench_settings import MemoryBench

    return _bench(parser, MemoryBench, argv)


def bench_reading(argv: list[str]) -> int:
    """The forward of one compressive layer against the same as a cumulative sum, and against attention."""
    parser = _parser(
        "bench reading",
        bench_reading,
        "newllm bench reading",
        "newllm bench reading --num-heads 1 --rival-gigabytes 18 --rounds 3",
        "newllm bench reading --layers infini:local=linear,use_delta_rule=false multi_memory pythia --num-heads 8",
    )
    from newllm.evaluation.bench_settings import ReadingBench

    return _bench(parser, ReadingBench, argv)


def bench_growth(argv: list[str]) -> int:
    """State bytes, decoding time and memory while models read a long text."""
    parser = _parser(
        "bench growth",
        bench_growth,
        "newllm bench growth --plot growth.html",
        "newllm bench growth --models pythia infini_all infini_all:memory_head_dim=64 --marks 1000 10000 100000",
    )
    from newllm.evaluation.bench_settings import GrowthBench

    return _bench(parser, GrowthBench, argv)


def bench_lagged(argv: list[str]) -> int:
    """Training of models that feed a state back: Lagged Cache Training against step by step."""
    parser = _parser(
        "bench lagged",
        bench_lagged,
        "newllm bench lagged",
        "newllm bench lagged --model continuous --methods step_by_step lagged lagged:deep_share=0.1,deep_passes=4",
        "newllm bench lagged --quality true --quality-samples 2000 --seeds 0 1 2",
    )
    from newllm.evaluation.bench_lagged_settings import LaggedBench

    return _bench(parser, LaggedBench, argv, "newllm.commands.lagged_bench:run")


def bench_vintix(argv: list[str]) -> int:
    """A step of the Vintix engine, whose keys and values lie in a ring, against reading the context again."""
    parser = _parser(
        "bench vintix",
        bench_vintix,
        "newllm bench vintix",
        "newllm bench vintix --context 8192 --environments 1 --rounds 1",
    )
    from newllm.vintix.settings import VintixBench

    return _bench(parser, VintixBench, argv, "newllm.commands.vintix:bench")


def vintix_collect(argv: list[str]) -> int:
    """Collect learning histories: a demonstrator whose noise fades, in many tasks."""
    from newllm.vintix.settings import CollectSettings

    parser = _vintix_parser(
        "collect",
        vintix_collect,
        "newllm vintix collect --config tiny",
        "newllm vintix collect --environment pendulum --history-steps 4000 --noise-power 2 --out pendulum",
    )
    parser.add_argument("--out", metavar="DIR", help="Folder of the histories (default: runs/vintix-NAME/histories).")
    settings = _vintix_settings(parser, argv, CollectSettings)
    if settings is None:
        return 0
    from newllm.commands.vintix import collect as run

    run(settings, parser.parse_args(argv).out)
    return 0


def vintix_train(argv: list[str]) -> int:
    """Train action models on learning histories, one for each seed; started again, it continues where it was."""
    from newllm.vintix.settings import VintixModelSettings, VintixTrainSettings

    parser = _vintix_parser(
        "train",
        vintix_train,
        "newllm vintix train runs/vintix-point_reacher/histories --config tiny",
        "newllm vintix train histories --config tiny --seeds 0 1 2 --control-seeds 0 1 2 --out runs/point",
        "newllm vintix train point reacher --config small",
        usage="HISTORIES …",
    )
    parser.add_argument("histories", nargs="+", metavar="HISTORIES", help="Folders that newllm vintix collect wrote.")
    parser.add_argument("--out", metavar="DIR", help="Folder of the run folders (default: runs/vintix-NAME).")
    settings = _vintix_settings(parser, argv, VintixModelSettings, VintixTrainSettings)
    if settings is None:
        return 0
    from newllm.commands.vintix import train as run

    arguments = parser.parse_args(argv)
    run(settings, arguments.histories, arguments.out)
    return 0


def vintix_evaluate(argv: list[str]) -> int:
    """Play tasks no model has seen, with the controls that tell where the score comes from, and write one report."""
    from newllm.vintix.settings import VintixEvaluateSettings

    parser = _vintix_parser(
        "evaluate",
        vintix_evaluate,
        "newllm vintix evaluate runs/vintix-point_reacher --config tiny",
        "newllm vintix evaluate runs/a/seed-0 runs/b/seed-1 --episodes 30 --out runs/both",
        usage="FOLDER …",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="Run folders, or folders of them: all seeds.")
    parser.add_argument("--out", metavar="DIR", help="Folder of the report (default: the first FOLDER).")
    settings = _vintix_settings(parser, argv, VintixEvaluateSettings, "device", "threads")
    if settings is None:
        return 0
    from newllm.commands.vintix import evaluate as run

    arguments = parser.parse_args(argv)
    run(settings, arguments.folders, arguments.out)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "report": report,
    "check": check,
    "memory absorb": memory_absorb,
    "memory show": memory_show,
    "memory ask": memory_ask,
    "data prepare": data_prepare,
    "data show": data_show,
    "bench train": bench_train,
    "bench decode": bench_decode,
    "bench memory": bench_memory,
    "bench reading": bench_reading,
    "bench growth": bench_growth,
    "bench lagged": bench_lagged,
    "bench vintix": bench_vintix,
    "vintix collect": vintix_collect,
    "vintix train": vintix_train,
    "vintix evaluate": vintix_evaluate,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # Libraries report every file they load; what matters is said by the commands themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"newllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumable = argv[0] in ("compare", "train") or argv[:2] == ["vintix", "train"]
        continues = "; the same command continues where it was" if resumable else ""
        print(f"\nnewllm: interrupted{continues}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `newllm generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(argv: list[str]) -> int:
    first = argv[0] if argv else "--help"
    if first in ("-h", "--help"):
        print(OVERVIEW.format(commands=_command_list("")), end="")
        return 0
    if first == "--version":
        print(f"newllm {__version__}")
        return 0
    if first in COMMANDS:
        return COMMANDS[first](argv[1:])
    group = {name.split()[1]: name for name in COMMANDS if name.startswith(f"{first} ")}
    if not group:
        names = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
        raise nearest(first, ["--help", "--version"] if first.startswith("-") else names, "command")
    second = argv[1] if len(argv) > 1 else "--help"
    if second in ("-h", "--help"):
        print(f"usage: newllm {first} COMMAND [--help] …\n\n{_command_list(first + ' ')}")
        return 0
    if second not in group:
        raise nearest(second, list(group), f"{first} command")
    return COMMANDS[group[second]](argv[2:])


def _command_list(prefix: str) -> str:
    chosen = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
    return "\n".join(f"  {name:15} {command.__doc__}" for name, command in chosen.items())


def _parser(name: str, command: Callable[[list[str]], int], *examples: str, usage: str = "") -> Parser:
    from newllm.commands.flags import Parser

    usage = f"{usage} [--FLAG VALUE …]".strip()
    return Parser(name, command.__doc__ or "", "\n".join(f"  {example}" for example in examples), usage)


def _vintix_parser(name: str, command: Callable[[list[str]], int], *examples: str, usage: str = "") -> Parser:
    """A parser that knows the named configs of Vintix; presets of language models are not its matter."""
    from newllm.vintix.settings import CONFIGS_FOLDER

    parser = _parser(f"vintix {name}", command, *examples, usage=usage)
    parser.configs = CONFIGS_FOLDER
    parser.epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    return parser


def _vintix_settings(parser: Parser, argv: list[str], *chosen: type | str) -> VintixSettings | None:
    """The settings of a command, over its config file's, which may hold those of the others too; None if printed."""
    from newllm.commands.flags import read_config
    from newllm.vintix.settings import VintixSettings

    parser.add_settings(VintixSettings, chosen)
    arguments = parser.parse(argv)
    values = {} if arguments.config is None else read_config(arguments.config, VintixSettings, parser.configs)
    settings = parser.settings(arguments, VintixSettings(**values))
    if arguments.print_config:
        _print_config(settings)
        return None
    return settings


def _print_config(settings) -> int:
    from newllm.commands.flags import print_config

    print_config(settings)
    return 0


def _data(name: str, command: Callable[[list[str]], int], argv: list[str], sample: bool) -> int:
    parser = _parser(
        f"data {name}", command, f"newllm data {name}", f"newllm data {name} --data my.jsonl --text-field body"
    )
    from newllm.settings import DataSettings, RunSettings, resolve

    parser.add_settings(RunSettings, (DataSettings, "scale"))
    arguments = parser.parse(argv)
    settings = resolve(parser.settings(arguments))
    if arguments.print_config:
        return _print_config(settings)
    from newllm.data import describe, prepare, sample_text

    data = prepare(settings, print)
    for label, text in describe(data):
        print(f"{label:22} {text}")
    if sample:
        print(f"\nThe training text begins:\n\n{sample_text(data, 'train')}")
    return 0


def _bench(parser: Parser, cls: type, argv: list[str], function: str = "newllm.commands.bench:run") -> int:
    """Runs a benchmark by its settings of type cls; `function`, MODULE:NAME, is imported when it is needed."""
    parser.add_settings(cls)
    arguments = parser.parse(argv)
    settings = parser.settings(arguments)
    if arguments.print_config:
        return _print_config(settings)
    pkgutil.resolve_name(function)(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
