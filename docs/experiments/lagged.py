"""Joins what `newllm bench lagged --quality true` printed for one seed each: python docs/experiments/lagged.py

Reads lagged/seed-*.json, whose settings may differ in the seed alone; prints the table of all, and draws lagged.png
(with Chromium).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from newllm.commands.bench_lagged import quality_table, speed_table
from newllm.commands.lagged_plot import quality_figure
from newllm.commands.plot_page import write_page
from newllm.experiments.terminal import table_console

HERE = Path(__file__).parent
SCREENSHOT = HERE.parent.parent / "tests" / "screenshot.py"


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result with the seeds of all.

    Raises ValueError if their settings differ in more than the seed.
    """
    first = results[0]
    for result in results[1:]:
        if {**result["settings"], "seeds": None} != {**first["settings"], "seeds": None}:
            raise ValueError("the settings of these runs differ in more than the seed")
    seeds = [seed for result in results for seed in result["settings"]["seeds"]]
    quality = [record for result in results for record in result["quality"]]
    return first | {"settings": first["settings"] | {"seeds": seeds}, "quality": quality}


if __name__ == "__main__":
    results = [json.loads(path.read_text()) for path in sorted((HERE / "lagged").glob("seed-*.json"))]
    console = table_console()
    for result in results:
        console.print(speed_table(result))
    result = joined(results)
    console.print(quality_table(result))
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "lagged.html"
        write_page(quality_figure(result), html)
        command = [sys.executable, str(SCREENSHOT), str(html), str(HERE / "lagged.png")]
        subprocess.run([*command, "--width", "1120", "--height", "660"], check=True)
