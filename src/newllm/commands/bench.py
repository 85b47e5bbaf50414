"""`newllm bench train|decode`: measures, prints a table for people, then one JSON line for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from newllm.evaluation.bench import DecodeBench, TrainBench, bench_decode, bench_train
from newllm.evaluation.efficiency import WorkerError
from newllm.settings import UserError

TITLES = {"train": "training", "decode": "decoding, batch 1"}


def run(settings: TrainBench | DecodeBench) -> dict[str, Any]:
    """Measures and prints.

    Raises:
        UserError: an unknown model, a value out of range, or a measuring process that died.
    """
    console = Console(stderr=True)
    try:
        with console.status("starting") as status:
            if isinstance(settings, TrainBench):
                result = bench_train(settings, status.update)
            else:
                result = bench_decode(settings, status.update)
    except WorkerError as error:
        raise UserError(str(error)) from error
    Console().print(table(result))
    print(json.dumps(result))
    return result


def table(result: dict[str, Any]) -> Table:
    """One row for each case and model."""
    machine = result["machine"]
    title = f"{TITLES[result['benchmark']]}: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    train = result["benchmark"] == "train"
    view = Table(
        title=title, caption="ratio: medians, towards Hugging Face's GPT-NeoX in the same rounds (range over rounds)"
    )
    for name in ("batch", "model", "tokens/s", "peak memory") if train else ("context", "model", "ms/token", "prefill"):
        view.add_column(name, justify="left" if name == "model" else "right")
    view.add_column("speed ratio", justify="right")
    if train:
        view.add_column("memory ratio", justify="right")
    for case in result["cases"]:
        for row in case["rows"]:
            low, high = row["speed_ratio_range"]
            ratio = f"{row['speed_ratio']:.2f} ({low:.2f}–{high:.2f})"
            if train:
                cells = [
                    f"{case['batch_size']} × {case['seq_length']}",
                    row["model"],
                    f"{row['tokens_per_second']:,.0f}",
                ]
                cells += [f"{row['peak_bytes'] / 1e9:.2f} GB", ratio, f"{row['memory_ratio']:.2f}"]
            else:
                cells = [f"{case['context']:,}", row["model"], f"{row['ms_per_token']:.2f}"]
                cells += [f"{row['prefill_ms'] / 1000:.1f} s", ratio]
            view.add_row(*cells)
        view.add_section()
    return view
