"""The main job: several models on the same text under the same budget, then one report.

Everything that can be wrong with the input is found before anything trains. Each run is stored when it is done, and
results.json and the report are written anew after each, so that an interrupted comparison is readable, and continues.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from newllm.data import prepare
from newllm.evaluation.efficiency import measure_all
from newllm.experiments.progress import Display, duration
from newllm.experiments.report import write_report
from newllm.experiments.results import print_table, write_results
from newllm.experiments.rows import make_row
from newllm.models import check_model_spec, load_plugin
from newllm.settings import ExperimentSettings, RunSettings, UserError, resolve
from newllm.training import machine_info, resolve_device, set_threads, train
from newllm.training.checkpoints import (
    claim_run_folder,
    explaining_full_disk,
    lock,
    make_folder,
    read_result,
    write_result,
    write_whole,
)

if TYPE_CHECKING:
    from newllm.data import PreparedData


def compare(settings: ExperimentSettings) -> Path:
    """Trains, evaluates and measures every model with every seed; returns the path of report.html.

    Started again with the same folder, finished runs are kept and an unfinished one continues. A run that fails is
    recorded under "failed" in results.json and the others go on; if all fail, the first error is raised.
    """
    settings = resolve(settings)
    resolve_device(settings)
    set_threads(settings)
    check_models(settings)
    out = resolve_out(settings)
    make_folder(out)
    console = Console()
    runs = settings.runs()
    with lock(out), Display(console, len(runs)) as display:
        data = prepare(settings, display.say)
        comparison = Comparison(settings, out, data, display)
        for index, run in enumerate(runs):
            display.start(index, run)
            comparison.add(run)
        if not comparison.rows:
            raise comparison.errors[0]
        comparison.write()
        if settings.efficiency:
            display.phase("measuring speed and memory, one model at a time")
            comparison.add_efficiency()
    console.print()
    print_table(comparison.results(), console)
    return out / "report.html"


def resolve_out(settings: ExperimentSettings) -> Path:
    """The compare folder: --out, or runs/NAME-SCALE."""
    return (
        Path(settings.out)
        if settings.out is not None
        else Path("runs") / file_name(f"{settings.name}-{settings.scale}")
    )


def run_folder(out: Path, run: RunSettings) -> Path:
    return out / file_name(f"{run.model}-seed{run.seed}")


def is_finished(result: dict[str, Any], run: RunSettings) -> bool:
    """Whether a run folder's result.json holds the row of exactly this run; training alone may be older."""
    return bool(result.get("row", {}).get("hash") == run.hash())


def file_name(text: str) -> str:
    """The text with what a file name cannot hold on some system replaced."""
    return re.sub(r"[^\w.,=-]+", "_", text)


def check_models(settings: ExperimentSettings) -> None:
    """Raises UserError for a model that cannot be built, before anything trains."""
    if settings.plugin is not None:
        load_plugin(settings.plugin)
    for model in settings.models:
        check_model_spec(
            model,
            hidden_size=settings.hidden_size,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            intermediate_size=settings.intermediate_size,
        )


class Comparison:
    """The runs so far, and the files that show them."""

    def __init__(self, settings: ExperimentSettings, out: Path, data: PreparedData, display: Display) -> None:
        self.settings, self.out, self.data, self.display = settings, out, data, display
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.errors: list[Exception] = []

    def add(self, run: RunSettings) -> None:
        """Trains and evaluates a run and writes results and report anew; or takes it from its folder."""
        folder = run_folder(self.out, run)
        finished = is_finished(claim_run_folder(folder, run, self.data.fingerprint), run)
        try:
            row = self.finished_row(run, folder)
        except Exception as error:  # one broken model must not cost the others their results
            (folder / "error.txt").write_text(traceback.format_exc())
            self.errors.append(error)
            line = (str(error).splitlines() or ["no message"])[0]
            if not isinstance(error, UserError):
                line = f"{type(error).__name__}: {line}"
            self.failed.append({"model": run.model, "seed": run.seed, "error": line})
            self.display.say(f"{self.display.run}: failed: {line} (details: {folder / 'error.txt'})")
        else:
            self.rows.append(row)
            self.display.say(
                f"{self.display.run}: test perplexity {row['test_ppl']:.2f}, {row['tokens']:,} tokens "
                f"in {duration(row['seconds'])}{'' if row['valid'] else ', INVALID: it fails a check'}"
                f"{', kept from before' if finished else ''}"
            )
        if not finished:
            self.write()

    def finished_row(self, run: RunSettings, folder: Path) -> dict[str, Any]:
        result = read_result(folder)
        if not is_finished(result, run):
            training = train(run, self.data, folder, self.display)
            self.display.phase("evaluating")
            result = read_result(folder) | {"row": make_row(run, self.data, folder, training)}
            write_result(folder, result)
        (folder / "error.txt").unlink(missing_ok=True)
        return result["row"]

    def add_efficiency(self) -> None:
        """Measures the models side by side, on one seed's weights: speed and memory do not depend on the seed.

        Kept in efficiency.json for as long as it is about the same models and settings, since it takes a while.
        """
        rows: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            rows.setdefault(row["model"], row)
        key = {
            "runs": {model: row["hash"] for model, row in rows.items()},
            "settings": [self.settings.efficiency_seconds, self.settings.decode_context],
            "machine": machine_info(),
        }
        path = self.out / "efficiency.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get("key") != key:
            folders = [run_folder(self.out, self.run_of(row)) for row in rows.values()]
            measured = dict(zip(rows, measure_all(folders, self.settings), strict=True))
            known = {"key": key, "measured": measured}
            errors = [
                figures["efficiency_error"] for figures in known["measured"].values() if figures["efficiency_error"]
            ]
            for error in errors:
                self.display.say(f"not measured: {error}")
            if not errors:
                write_whole(path, json.dumps(known, indent=1) + "\n")
        for row in self.rows:
            row |= known["measured"][row["model"]]
        self.write()

    def run_of(self, row: dict[str, Any]) -> RunSettings:
        return next(run for run in self.settings.runs() if (run.model, run.seed) == (row["model"], row["seed"]))

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "name": self.settings.name,
            "settings": dataclasses.asdict(self.settings),
            "command": command(self.settings),
            "machine": machine_info(),
            "data": self.data.info,
            "baseline": self.settings.models[0],
            "created": self.created,
            "version": version("new-llm"),
            "rows": self.rows,
            "failed": self.failed,
        }

    def write(self) -> None:
        with explaining_full_disk(self.out):
            write_results(self.out, self.results())
            if self.rows:
                write_report(self.out)


def command(settings: ExperimentSettings) -> str:
    """The command line that repeats the comparison; settings must be resolved. Values of the scale are left out."""
    defaults = resolve(ExperimentSettings(scale=settings.scale))
    words = ["newllm", "compare"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "scale" or (value != getattr(defaults, field.name) and value is not None):
            values = value if isinstance(value, list) else [value]
            words += ["--" + field.name.replace("_", "-"), *(flag_value(item) for item in values)]
    return shlex.join(words)


def flag_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
