"""Commands of Vintix, which share one config file: each takes from it what concerns it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from newllm.cli.registry import command
from newllm.vintix.settings import (
    CONFIGS_FOLDER,
    CollectSettings,
    VintixEvaluateSettings,
    VintixModelSettings,
    VintixSettings,
    VintixTrainSettings,
)

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from newllm.commands.flags import Parser


@command(
    "vintix collect",
    "newllm vintix collect --config tiny",
    "newllm vintix collect --environment pendulum --history-steps 4000 --noise-power 2 --out pendulum",
    configs=CONFIGS_FOLDER,
)
def collect(parser: Parser, argv: list[str]) -> None:
    """Collect learning histories: a demonstrator whose noise fades, in many tasks."""
    parser.add_argument("--out", metavar="DIR", help="Folder of the histories (default: runs/vintix-NAME/histories).")
    arguments, settings = _parsed(parser, argv, CollectSettings)
    from newllm.commands.vintix import collect as run

    run(settings, arguments.out)


@command(
    "vintix train",
    "newllm vintix train runs/vintix-point_reacher/histories --config tiny",
    "newllm vintix train histories --config tiny --seeds 0 1 2 --control-seeds 0 1 2 --out runs/point",
    "newllm vintix train point reacher --config small",
    usage="HISTORIES …",
    configs=CONFIGS_FOLDER,
)
def train(parser: Parser, argv: list[str]) -> None:
    """Train action models on learning histories, one for each seed; started again, it continues where it was."""
    parser.add_argument("histories", nargs="+", metavar="HISTORIES", help="Folders that newllm vintix collect wrote.")
    parser.add_argument("--out", metavar="DIR", help="Folder of the run folders (default: runs/vintix-NAME).")
    arguments, settings = _parsed(parser, argv, VintixModelSettings, VintixTrainSettings)
    from newllm.commands.vintix import train as run

    run(settings, arguments.histories, arguments.out)


@command(
    "vintix evaluate",
    "newllm vintix evaluate runs/vintix-point_reacher --config tiny",
    "newllm vintix evaluate runs/a/seed-0 runs/b/seed-1 --episodes 30 --out runs/both",
    usage="FOLDER …",
    configs=CONFIGS_FOLDER,
)
def evaluate(parser: Parser, argv: list[str]) -> None:
    """Play tasks no model has seen, with the controls that tell where the score comes from, and write one report."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="Run folders, or folders of them: all seeds.")
    parser.add_argument("--out", metavar="DIR", help="Folder of the report (default: the first FOLDER).")
    arguments, settings = _parsed(parser, argv, VintixEvaluateSettings, "device", "threads")
    from newllm.commands.vintix import evaluate as run

    run(settings, arguments.folders, arguments.out)


def _parsed(parser: Parser, argv: list[str], *chosen: type | str) -> tuple[Namespace, VintixSettings]:
    """The arguments, and the settings over those of the config file, which may hold the other commands' too."""
    from newllm.commands.flags import read_config

    parser.add_settings(VintixSettings, chosen)
    arguments = parser.parse(argv)
    values = {} if arguments.config is None else read_config(arguments.config, VintixSettings, parser.configs)
    return arguments, parser.settings(arguments, VintixSettings(**values))
