"""Tables in the terminal; that of the main figures of a comparison."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from newllm.experiments.columns import LEAD, MAIN_COLUMNS
from newllm.experiments.figures import difference_percent, figure, number
from newllm.experiments.results import Results
from newllm.experiments.summary import best_models, decimals, ranked, summarise

TABLE_WIDTH = 100
"""Columns of a printed table where the output is no terminal that has a width of its own."""
TERMINAL_COLUMNS = [column for column in MAIN_COLUMNS if column.key not in ("test_bits_per_byte", "peak_memory_bytes")]


def table_console() -> Console:
    """A console on standard output that is wide enough for a table."""
    return Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)


def print_table(results: Results, console: Console) -> None:
    """The main figures in the terminal, within 100 columns."""
    summaries = summarise(results)
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("\nModel", overflow="fold", min_width=12)
    shown = [c for c in TERMINAL_COLUMNS if any(s.values[c.key] for s in summaries)]
    for column in shown:
        table.add_column(f"{column.label}\n{column.unit}", justify="right", no_wrap=True)
        if column is LEAD:
            table.add_column("to\nbaseline", justify="right", no_wrap=True)
    for summary in ranked(summaries):
        name = escape(summary.model) + ("" if summary.valid else " [bold red]INVALID[/]")
        cells = []
        for column in shown:
            value, places = summary.values[column.key], decimals(summaries, column)
            mean = "—" if value is None else number(value.mean, places)
            text = figure(value, places) if column is LEAD else mean
            cells.append(f"[bold green]{text}[/]" if summary.model in best_models(summaries, column) else text)
            if column is LEAD:
                difference = summary.differences[LEAD.key]
                against = difference_percent(difference) if difference else "—"
                cells.append("baseline" if summary.is_baseline else against)
        table.add_row(name, *cells)
    console.print(table)
    if any(value.half_width for s in summaries if (value := s.values[LEAD.key])):
        wide = any((difference := s.differences[LEAD.key]) and difference.wide for s in summaries)
        brackets = " In brackets, where it is wide: that of the geometric mean." if wide else ""
        console.print(f"± is the 95 % interval over seeds.{brackets}", style="dim")
    for failure in results["failed"]:
        console.print(
            f"[bold red]failed[/] {escape(failure['model'])}, seed {failure['seed']}: {escape(failure['error'])}"
        )
