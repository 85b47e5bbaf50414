"""Commands for memory files: a text read into one, what it holds, what a model makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from newllm.cli.registry import PLACE, command
from newllm.settings import RunSettings

if TYPE_CHECKING:
    from newllm.commands.flags import Parser


@command(
    "memory absorb",
    "newllm memory absorb runs/infini book.txt --out book.memory",
    "newllm memory absorb runs/infini part2.txt --into book.memory",
    "cat *.txt | newllm memory absorb runs/infini - --out all.memory --window 512",
    usage="MODEL TEXT --out FILE",
)
def absorb(parser: Parser, argv: list[str]) -> None:
    """Read a text into a memory file, which another process or computer can use."""
    from newllm.commands import memory as run

    parser.add_argument("model", metavar="MODEL", help="Run folder or model folder of a model with memory layers.")
    parser.add_argument("text", metavar="TEXT", help="Text file (UTF-8); - for standard input.")
    parser.add_settings(run.AbsorbSettings, (run.AbsorbSettings, *PLACE))
    arguments = parser.parse(argv)
    run.absorb(parser.settings(arguments, run.AbsorbSettings(model=arguments.model)), arguments.text)


@command(
    "memory show",
    "newllm memory show book.memory",
    "newllm memory show book.memory --model runs/infini",
    usage="FILE",
)
def show(parser: Parser, argv: list[str]) -> None:
    """Show what a memory file holds: layers, bytes, tokens read, by which model."""
    from newllm.commands import memory as run

    parser.add_argument("file", metavar="FILE", help="Memory file.")
    parser.add_argument("--model", metavar="MODEL", help="Folder of its model: checks that it fits, shows the gates.")
    parser.add_settings(RunSettings, PLACE)
    arguments = parser.parse(argv)
    given = {} if arguments.model is None else {"model": arguments.model}
    settings = parser.settings(arguments, RunSettings(**given))
    run.show(arguments.file, settings if given else None)


@command(
    "memory ask",
    'newllm memory ask runs/infini book.memory --prompt "To be, or not"',
    "newllm memory ask runs/infini book.memory --temperature 0 --max-new-tokens 50 < question.txt",
    usage="MODEL FILE --prompt TEXT",
)
def ask(parser: Parser, argv: list[str]) -> None:
    """Continue a prompt with a memory and without it, and tell what the memory knows of the prompt."""
    from newllm.commands.generate import GenerateSettings
    from newllm.commands.memory import ask as run

    parser.add_argument("model", metavar="MODEL", help="Run folder or model folder.")
    parser.add_argument("file", metavar="FILE", help="Memory file that this model wrote.")
    parser.add_settings(GenerateSettings, (GenerateSettings, "seed", *PLACE))
    arguments = parser.parse(argv)
    run(parser.settings(arguments, GenerateSettings(model=arguments.model)), arguments.file)
