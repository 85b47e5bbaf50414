"""`newllm bench lagged`: measures, prints a table for people, then one JSON line for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich import box
from rich.table import Table

from newllm.bench.lagged import bench_lagged
from newllm.bench.lagged_settings import LaggedBench
from newllm.commands.bench import measuring
from newllm.experiments.figures import figure, number
from newllm.experiments.results import finite
from newllm.experiments.statistics import Estimate, estimate
from newllm.experiments.terminal import table_console
from newllm.paths import user_path


def run(settings: LaggedBench) -> dict[str, Any]:
    """Measures and prints. What is infinite is None in the result, and null in its line.

    Raises:
        UserError: an unknown model or method, a value out of range, or a measuring process that died.
    """
    with measuring() as progress:
        result = finite(bench_lagged(settings, progress))
    console = table_console()
    console.print(speed_table(result))
    if result["quality"]:
        console.print(quality_table(result))
    print(json.dumps(result, allow_nan=False))
    if settings.plot is not None:
        from newllm.commands.lagged_plot import quality_figure
        from newllm.commands.plot_page import write_page

        write_page(quality_figure(result), user_path(settings.plot))
        print(f"plot: {settings.plot}", file=sys.stderr)
    return result


def speed_table(result: dict[str, Any]) -> Table:
    """A row for each method."""
    machine, settings, (case,) = result["machine"], result["settings"], result["cases"]
    (first,) = result["references"]
    columns = ["ms/step", "tokens/s", "min/epoch", "peak GB", "states GB", f"speed / {first}"]
    view = _table(
        f"training {settings['model']}, {result['precision']}: {machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}",
        f"Batches of {case['batch_size']} × {case['seq_length']} tokens, epochs of {settings['samples']:,} windows; "
        "in the first, lagged steps take a forward pass more. Deeper steps are counted by their share. "
        "Peak: without the states that are kept of an epoch's windows. Ratios: median and range over the rounds.",
        columns,
    )
    for row in case["rows"]:
        ratio = row["speed_ratios"][first]
        low, high = ratio["range"]
        view.add_row(
            row["model"],
            f"{1000 * row['seconds']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds_per_epoch'] / 60:,.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['kept_bytes'] / 1e9:.2f}" if row["kept_bytes"] else "",
            f"{ratio['ratio']:.1f} ({low:.1f}–{high:.1f})",
        )
    return view


def quality_table(result: dict[str, Any]) -> Table:
    """A row for each method: test perplexity at equal epochs and at equal time, and how far from the first method's.

    A perplexity that is not finite is None in the records.
    """
    settings, records = result["settings"], result["quality"]
    (first,) = result["references"]
    seeds = len(settings["seeds"])
    view = _table(
        "test perplexity by true recurrence",
        f"Epochs of {settings['quality_samples']:,} windows; {seeds} seed{'s' if seeds > 1 else ''}"
        f"{', 95 % intervals' if seeds > 1 else ''}. Equal time: as long in training steps as {first}. "
        f"Each run validates {settings['quality_evaluations']} times and keeps its best weights. "
        f"Difference to {first}, paired by seed. ∞: not finite, in so many of the seeds.",
        ["equal epochs", "difference", "equal time", "difference", "epochs then"],
    )
    of_first = {record["seed"]: record["test_ppl"] for record in records if record["method"] == first}
    for method in settings["methods"]:
        cells = []
        for equal in ("epochs", "time"):
            same = "epochs" if method == first else equal  # the first method's time is that of its epochs
            own = [record for record in records if record["method"] == method and record["equal"] == same]
            ppls = [record["test_ppl"] for record in own]
            infinite = ppls.count(None)
            cells.append(f"∞ ({infinite} of {seeds})" if infinite else figure(estimate(ppls), 2))
            cells.append("" if method == first else figure(ppl_difference(own, of_first), 1, signed=True, unit=" %"))
        # Each seed that was measured by itself has a time of its own, and so epochs of its own.
        epochs = sorted(record["epochs"] for record in own)
        ends = dict.fromkeys(number(count, 1) for count in (epochs[0], epochs[-1])) if epochs else {}
        view.add_row(method, *cells, "–".join(ends))
    return view


def ppl_difference(records: list[dict[str, Any]], of_first: dict[int, float | None]) -> Estimate | None:
    """Test perplexity in percent above the first method's of the same seed; None where one of them is not finite."""
    differences = []
    for record in records:
        ours, theirs = record["test_ppl"], of_first[record["seed"]]
        if ours is None or theirs is None:
            return None
        differences.append(100 * (ours / theirs - 1))
    return estimate(differences)


def _table(title: str, caption: str, columns: list[str]) -> Table:
    view = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    view.add_column("method", overflow="fold", vertical="bottom")
    for name in columns:
        view.add_column(name, justify="right", vertical="bottom")
    return view
