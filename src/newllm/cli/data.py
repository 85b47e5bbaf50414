"""Commands that make a corpus ready for training, or show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from newllm.cli.registry import command
from newllm.resolution import resolve
from newllm.settings import DataSettings, RunSettings

if TYPE_CHECKING:
    from newllm.commands.flags import Parser
    from newllm.data import PreparedData


@command("data prepare", "newllm data prepare", "newllm data prepare --data my.jsonl --text-field body")
def prepare(parser: Parser, argv: list[str]) -> None:
    """Read a corpus, train or load its tokenizer, and store the token files that later runs use."""
    _described(parser, argv)


@command("data show", "newllm data show", "newllm data show --data my.jsonl --text-field body")
def show(parser: Parser, argv: list[str]) -> None:
    """Show what a corpus consists of, how it is split and tokenised, and how its text begins."""
    data = _described(parser, argv)
    from newllm.data import sample_text

    print(f"\nThe training text begins:\n\n{sample_text(data, 'train')}")


def _described(parser: Parser, argv: list[str]) -> PreparedData:
    parser.add_settings(RunSettings, (DataSettings, "scale"))
    settings = parser.settings(parser.parse(argv), complete=resolve)
    from newllm.data import describe, prepare

    data = prepare(settings, print)
    for label, text in describe(data):
        print(f"{label:22} {text}")
    return data
