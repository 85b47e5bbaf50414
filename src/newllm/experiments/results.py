"""results.json: written atomically, read with checks; and the figures of a comparison, one summary for each model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from newllm.experiments.columns import ALL_COLUMNS, EXACT, LEAD, MAIN_COLUMNS, Column
from newllm.experiments.statistics import Difference, Estimate, estimate, paired_difference
from newllm.settings import UserError
from newllm.training.checkpoints import write_whole

if TYPE_CHECKING:
    from rich.console import Console

FILE_NAME = "results.json"
TERMINAL_COLUMNS = [column for column in MAIN_COLUMNS if column.key not in ("test_bits_per_byte", "peak_memory_bytes")]

NO_BREAK = "\u00a0"

Results = dict[str, Any]
Row = dict[str, Any]

TEXT, NUMBER, RECORD, LIST, FLAG = "text", "a number", "an object", "a list", "true or false"
OUTCOME = "true, false or null (not judged)"
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    TEXT: (str,),
    NUMBER: (int, float),
    RECORD: (dict,),
    LIST: (list,),
    FLAG: (bool,),
    OUTCOME: (bool, type(None)),
}
TOP_FIELDS = {
    **dict.fromkeys(("name", "command", "baseline", "created", "version"), TEXT),
    **dict.fromkeys(("settings", "machine", "data"), RECORD),
    **dict.fromkeys(("rows", "failed"), LIST),
}
ROW_FIELDS = {"model": TEXT, "seed": NUMBER, "valid": FLAG, "checks": LIST}
# A measurement that was switched off, or that came out infinite, is null.
NULLABLE_ROW_FIELDS = {
    **dict.fromkeys(("layers", "sample", "hash"), TEXT),
    **dict.fromkeys(("parameters", "tokens", "steps", "seconds"), NUMBER),
    **dict.fromkeys(("val_loss", "val_ppl", "bits_per_byte", "test_loss", "test_ppl", "test_bits_per_byte"), NUMBER),
    **dict.fromkeys(("sliding_ppl", "segment_ppl"), NUMBER),
    **dict.fromkeys(("cache_bytes_per_token", "cache_bytes_allocated_per_token", "state_bytes"), NUMBER),
    **dict.fromkeys(("train_tokens_per_second", "peak_memory_bytes", "prefill_ms", "decode_ms_per_token"), NUMBER),
    **dict.fromkeys(("recall", "recall_across_segments", "reversal", "recurrence", "selective"), RECORD),
    **dict.fromkeys(("memories", "reconstruction", "projection", "ppl_band", "reused"), RECORD),
    **dict.fromkeys(("ppl_by_position", "curve"), LIST),
}
ITEM_FIELDS = {
    "checks": {"name": TEXT, "passed": OUTCOME, "detail": TEXT},
    "ppl_by_position": {"from": NUMBER, "to": NUMBER},
    "curve": {"tokens": NUMBER},
}
FAILED_FIELDS = {"model": TEXT, "seed": NUMBER, "error": TEXT}


def write_results(folder: Path, results: Results) -> Path:
    """Writes results.json so that a reader sees the old file or the new one, never half of one."""
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_finite(results), indent=1, allow_nan=False, ensure_ascii=False))
    return path


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN (a diverged run has them): they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(folder: Path) -> Results:
    """Reads and checks results.json of a compare folder (or the file itself)."""
    path = folder if folder.is_file() else folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a `newllm compare` run")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error.msg.lower()} at line {error.lineno}), perhaps cut off: "
            "start the compare command again, finished runs are kept"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: give a results.json written by `newllm compare`") from error
    _check_fields(results, TOP_FIELDS, f"{path} is not a result of `newllm compare`: the file")
    for index, row in enumerate(results["rows"]):
        where = f"{path}: row {index}"
        _check_fields(row, ROW_FIELDS, where)
        where += f" ({row['model']}, seed {row['seed']})"
        given = {key: kind for key, kind in NULLABLE_ROW_FIELDS.items() if row.get(key) is not None}
        _check_fields(row, given, where)
        for key, fields in ITEM_FIELDS.items():
            for number, item in enumerate(row.get(key) or []):
                _check_fields(item, fields, f"{where}: item {number} of '{key}'")
    for index, failure in enumerate(results["failed"]):
        _check_fields(failure, FAILED_FIELDS, f"{path}: failed run {index}")
    return results


def _check_fields(record: Any, fields: dict[str, str], where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where} must be an object, not {type(record).__name__}")
    for key, kind in fields.items():
        if key not in record:
            raise UserError(f"{where} has no '{key}'")
        value = record[key]
        if not isinstance(value, PYTHON_TYPES[kind]) or (kind == NUMBER and isinstance(value, bool)):
            raise UserError(f"{where} has '{key}' = {str(value)[:40]!r}: it must be {kind}")


def by_seed(rows: list[Row], column: Column) -> dict[int, float]:
    """A model's values by seed; of a figure measured once for each model one value, under 0: copies are no sample."""
    values = {row["seed"]: value for row in rows if (value := column.get(row)) is not None}
    return {0: next(iter(values.values()))} if column.once and values else values


@dataclass
class ModelSummary:
    """The figures of one model over its seeds; `differences` are to the baseline, None without one."""

    model: str
    rows: list[Row]
    is_baseline: bool
    values: dict[str, Estimate | None]
    differences: dict[str, Difference | None]

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    @property
    def valid(self) -> bool:
        """False when a run failed a check without which its perplexity means nothing: finite, future, rows."""
        return all(row["valid"] for row in self.rows)

    @property
    def layers(self) -> str:
        return self.rows[0].get("layers") or ""

    def by_seed(self, column: Column) -> dict[int, float]:
        return by_seed(self.rows, column)

    def mean(self, column: Column) -> float | None:
        value = self.values[column.key]
        return None if value is None else value.mean


def summarise(results: Results) -> list[ModelSummary]:
    """One summary for each model, in the order of the comparison."""
    rows_of: dict[str, list[Row]] = {}
    for row in results["rows"]:
        rows_of.setdefault(row["model"], []).append(row)
    baseline_rows = rows_of.get(results["baseline"], [])
    baseline_is_valid = all(row["valid"] for row in baseline_rows)
    summaries = []
    for model, rows in rows_of.items():
        is_baseline = model == results["baseline"]
        summary = ModelSummary(model, rows, is_baseline, {}, {})
        for key, column in ALL_COLUMNS.items():
            own = summary.by_seed(column)
            summary.values[key] = estimate(own.values())
            theirs = by_seed(baseline_rows, column)
            comparable = not is_baseline and baseline_is_valid and summary.valid
            summary.differences[key] = paired_difference(own, theirs) if comparable else None
        summaries.append(summary)
    return summaries


def best_models(summaries: Iterable[ModelSummary], column: Column) -> set[str]:
    """The models with the best mean of a column; empty where no direction is better or all are equal.

    Runs marked invalid do not compete.
    """
    means = {s.model: mean for s in summaries if s.valid and (mean := s.mean(column)) is not None}
    if not column.better or len(set(means.values())) < 2:
        return set()
    best = min(means.values()) if column.better == "lower" else max(means.values())
    return {model for model, mean in means.items() if mean == best}


def ranked(summaries: Iterable[ModelSummary]) -> list[ModelSummary]:
    """Lowest test perplexity first; models without one, then invalid ones, last."""
    return sorted(summaries, key=lambda s: (not s.valid, s.mean(LEAD) is None, s.mean(LEAD) or 0.0))


def decimals(summaries: Iterable[ModelSummary], column: Column) -> int:
    """Decimal places that give a typical value of the column its significant digits."""
    means = [abs(mean) for s in summaries if s.valid and (mean := s.mean(column))]
    if column.key in EXACT and all(mean == int(mean) for mean in means):
        return 0
    return max(0, column.digits - 1 - math.floor(math.log10(median(means)))) if means else 0


def number(value: float, places: int, signed: bool = False) -> str:
    """1,234.5 with a true minus sign; 1.2e+15 where a model has come apart."""
    kind = f",.{places}f" if abs(value) < 1e12 else ".1e"
    return f"{value:{'+' if signed else '-'}z{kind}}".replace("-", "−")


def percent(estimate_: Estimate) -> str:
    """−3.6 % ± 1.1, or −3.6 % where there is no interval (one seed, or an exact figure)."""
    places = 2 if estimate_.half_width and estimate_.half_width < 0.1 else 1
    return with_interval(number(estimate_.mean, places, signed=True) + NO_BREAK + "%", estimate_, places)


def with_interval(text: str, estimate_: Estimate, places: int) -> str:
    """Appends ± half the interval, where there is one that is not zero; the line never breaks inside."""
    return f"{text}{NO_BREAK}±{NO_BREAK}{number(estimate_.half_width, places)}" if estimate_.half_width else text


def value_text(summary: ModelSummary, column: Column, places: int) -> str:
    """61.23 ± 0.81, or a dash where nothing was measured."""
    value = summary.values[column.key]
    if value is None:
        return "—"
    return with_interval(number(value.mean, places), value, places)


def print_table(results: Results, console: Console) -> None:
    """The main figures in the terminal, within 100 columns."""
    from rich.markup import escape
    from rich.table import Table

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
            if column is LEAD:
                text = value_text(summary, column, places)
            else:
                text = "—" if value is None else number(value.mean, places)
            cells.append(f"[bold green]{text}[/]" if summary.model in best_models(summaries, column) else text)
            if column is LEAD:
                difference = summary.differences[LEAD.key]
                cells.append("baseline" if summary.is_baseline else percent(difference.percent) if difference else "—")
        table.add_row(name, *cells)
    console.print(table)
    if any(value.half_width for s in summaries if (value := s.values[LEAD.key])):
        console.print("± is the 95 % interval over seeds.", style="dim")
    for failure in results["failed"]:
        console.print(
            f"[bold red]failed[/] {escape(failure['model'])}, seed {failure['seed']}: {escape(failure['error'])}"
        )
