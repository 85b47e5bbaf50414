"""What a command of `newllm` is: a name, a function, examples. Its parser is made only when it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from newllm.commands.flags import Parser

Function = Callable[["Parser", list[str]], int | None]

# Settings that say how a trained model is opened.
PLACE = ("plugin", "device", "threads")


@dataclass(frozen=True)
class Command:
    """One command. Called with the words after its name, it runs and returns its exit code."""

    name: str
    about: str
    function: Function
    """Adds its flags to the parser, parses the words and acts; no exit code means that all went well."""
    examples: tuple[str, ...]
    usage: str = ""
    """What stands before the flags."""
    configs: Path | None = None
    """Folder of the configs that --config knows by name, if there are any."""

    def __call__(self, argv: list[str]) -> int:
        from newllm.commands.flags import ConfigPrinted, Parser

        examples = "\n".join(f"  {example}" for example in self.examples)
        usage = f"{self.usage} [--FLAG VALUE …]".strip()
        try:
            return self.function(Parser(self.name, self.about, examples, usage, self.configs), argv) or 0
        except ConfigPrinted:
            return 0


COMMANDS: dict[str, Command] = {}


def register(command: Command) -> None:
    COMMANDS[command.name] = command


def command(name: str, *examples: str, usage: str = "", configs: Path | None = None) -> Callable[[Function], Function]:
    """Registers a function under its name; its docstring is what `newllm --help` says of it."""

    def registered(function: Function) -> Function:
        register(Command(name, function.__doc__ or "", function, examples, usage, configs))
        return function

    return registered
