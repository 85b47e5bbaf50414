"""`newllm bench …`: measures, prints a table for people, then one JSON line for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from newllm.bench.decode import bench_decode
from newllm.bench.growth import bench_growth
from newllm.bench.memory import bench_memory
from newllm.bench.reading import bench_reading
from newllm.bench.settings import DecodeBench, GrowthBench, MemoryBench, ReadingBench, TrainBench
from newllm.bench.train import bench_train
from newllm.errors import UserError
from newllm.evaluation.processes import WorkerError
from newllm.experiments.terminal import table_console
from newllm.paths import user_path

SHORT = {"bfloat16": "bf16", "float32": "f32"}


@contextlib.contextmanager
def measuring() -> Iterator[Callable[[str], None]]:
    """Shows what is being measured, as the caller says; raises UserError for a measuring process that died.

    On a terminal each message takes the place of the one before; in a log each has its line.
    """
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        with console.status("starting") as status:
            yield status.update if console.is_terminal else console.print
    except WorkerError as error:
        raise UserError(str(error)) from error


def run(settings: TrainBench | DecodeBench | MemoryBench | ReadingBench | GrowthBench) -> dict[str, Any]:
    """Measures and prints.

    Raises:
        UserError: an unknown model, a value out of range, or a measuring process that died.
    """
    with measuring() as progress:
        match settings:
            case TrainBench():
                result = bench_train(settings, progress)
            case DecodeBench():
                result = bench_decode(settings, progress)
            case MemoryBench():
                result = bench_memory(settings, progress)
            case ReadingBench():
                result = bench_reading(settings, progress)
            case GrowthBench():
                result = bench_growth(settings, progress)
    table_console().print(table(result))
    print(json.dumps(result))
    if isinstance(settings, GrowthBench) and settings.plot is not None:
        from newllm.commands.growth_plot import growth_figure
        from newllm.commands.plot_page import write_page

        write_page(growth_figure(result), user_path(settings.plot))
        print(f"plot: {settings.plot}", file=sys.stderr)
    return result


def table(result: dict[str, Any]) -> Table:
    """A section for each case, in it a row for each model."""
    machine, settings = result["machine"], result["settings"]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    references = result["references"]
    cells: Callable[[dict[str, Any], list[str]], list[str]]
    match result["benchmark"]:
        case "train":
            title = f"training, {result['precision']}"
            columns = ["tokens/s", "peak GB", f"memory / {references[0]}"]
            columns += [f"speed / {reference}" for reference in references]
            caption = "Ratios: median and range over the rounds."
            cells = _train_cells
        case "decode":
            references = references[: len(settings["rivals"])] or references
            title = "decoding"
            columns = ["type", "ms/step", "cache MB", "ceiling"] + [f"speed / {reference}" for reference in references]
            caption = (
                "A step decodes one token in each row. Ceiling: share of the memory bandwidth, "
                f"{result['ceiling_bytes_per_second'] / 1e9:.1f} GB/s, at which it reads weights and cache. "
                "Ratios: median and range over the rounds, towards each rival in its faster type."
            )
            cells = _decode_cells
        case "memory":
            title = f"memory while one row is decoded, {SHORT[settings['dtype']]}"
            columns = ["cache bytes/token", "allocated bytes/token", "cache MB", "peak MB", "of it for the context"]
            caption = "Peak: resident memory of the process."
            cells = _memory_cells
        case "reading":
            title = f"forward of one layer, {SHORT[settings['dtype']]}"
            columns = ["ms", "ms a row", "peak MB", "speed / rival", "speed / first", "memory, rival's / own"]
            caption = (
                f"Rival: {references[0]}; first: {references[1]}. Peak: above what is resident with weights and input. "
                "Within a case all read equally many rows; the rival is missing where it would need more than "
                f"{settings['rival_gigabytes']:g} GB. Ratios of speed: median and range over the rounds."
            )
            cells = _reading_cells
        case "growth":
            title = f"reading a long text, one row, {SHORT[settings['dtype']]}"
            columns = ["ms/token", "state MB", "allocated MB", "peak MB", f"speed / {references[0]}"]
            caption = (
                "Milliseconds of a decoded token: median. Peak: above what is resident with the weights. "
                "Ratios: median and range over the rounds."
            )
            cells = _growth_cells
    view = Table(title=f"{title}: {where}", caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    view.add_column("model", overflow="fold", vertical="bottom")
    for name in columns:
        view.add_column(_narrow(name), justify="right", no_wrap=True, vertical="bottom")
    for case in result["cases"]:
        view.add_row(f"[bold]{_heading(case)}[/bold]")
        for row in case["rows"]:
            if row.get("best", True) or settings["all_precisions"]:
                view.add_row(row["model"], *cells(row, references))
        view.add_section()
    return view


def _heading(case: dict[str, Any]) -> str:
    if "tokens" in case:
        return f"{case['tokens']:,} tokens"
    if "num_heads" in case:
        return f"{case['batch_size']} × {case['seq_length']:,}, H {case['num_heads']}"
    if "seq_length" in case:
        return f"{case['batch_size']} × {case['seq_length']:,} tokens"
    rows = f"batch {case['batch_size']}, " if "batch_size" in case else ""
    return f"{rows}{case['context']:,} tokens"


def _train_cells(row: dict[str, Any], references: list[str]) -> list[str]:
    cells = [f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}"]
    return [*cells, _short(row["memory_ratios"][references[0]]), *(_ratio(row, name) for name in references)]


def _decode_cells(row: dict[str, Any], references: list[str]) -> list[str]:
    """The range over rounds is there for the first reference only, or the table would be too wide."""
    cells = [SHORT[row["dtype"]], f"{row['ms_per_step']:.2f}", f"{row['cache_bytes'] / 1e6:,.1f}"]
    ratios = [_short(row["speed_ratios"][name]["ratio"]) for name in references[1:]]
    return [*cells, f"{row['ceiling_share']:.0%}", _ratio(row, references[0]), *ratios]


def _memory_cells(row: dict[str, Any], _: list[str]) -> list[str]:
    bytes_per_token = [row["cache_bytes_per_token"], row["cache_bytes_allocated_per_token"]]
    megabytes = [row["cache_bytes"], row["peak_bytes"], row["peak_bytes"] - row["resident_bytes"]]
    return [f"{x:,.0f}" for x in bytes_per_token] + [f"{x / 1e6:,.1f}" for x in megabytes]


def _reading_cells(row: dict[str, Any], references: list[str]) -> list[str]:
    cells = [f"{1000 * row['seconds']:,.1f}", f"{row['ms_per_row']:,.1f}", f"{row['peak_bytes'] / 1e6:,.1f}"]
    less = row["less_memory"].get(references[0])
    return [*cells, *(_ratio(row, name) for name in references), "" if less is None else _short(less)]


def _growth_cells(row: dict[str, Any], references: list[str]) -> list[str]:
    numbers = [row["state_bytes"], row["state_bytes_allocated"], row["peak_bytes"] - row["resident_bytes"]]
    return [f"{row['ms_per_token']:.2f}", *(f"{x / 1e6:,.1f}" for x in numbers), _ratio(row, references[0])]


def _ratio(row: dict[str, Any], reference: str) -> str:
    """Empty where the reference was not measured."""
    if reference not in row["speed_ratios"]:
        return ""
    ratio = row["speed_ratios"][reference]
    return f"{_short(ratio['ratio'])} ({'–'.join(map(_short, ratio['range']))})"


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _narrow(heading: str) -> str:
    """In lines of at most eleven characters where its words allow."""
    return textwrap.fill(heading.replace("_", " "), 11, break_long_words=False)
