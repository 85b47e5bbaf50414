"""results.json: written atomically, read with checks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from newllm.errors import UserError
from newllm.training.checkpoints import write_whole

FILE_NAME = "results.json"

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
    **dict.fromkeys(("memories", "contexts", "reconstruction", "projection", "start", "ppl_band", "reused"), RECORD),
    **dict.fromkeys(("ppl_by_position", "curve"), LIST),
}
ITEM_FIELDS = {
    "checks": {"name": TEXT, "passed": OUTCOME, "detail": TEXT},
    "ppl_by_position": {"from": NUMBER, "to": NUMBER},
    "curve": {"tokens": NUMBER},
}
RECORD_KEYS = {
    "recall_across_segments": ("segment", "facts", "answers", "chance", "chance_among_told", "distances", "example"),
    "reversal": ("pairs", "kinds", "left_out", "needed", "told", "readings", "groups", "example", "ratio", "gap"),
    "recurrence": ("ppl", "passes"),
    "selective": ("ppl", "weighted_ppl", "weight", "max_skip", "passes"),
    "memories": ("ppl", "closed_ppl", "fine_closed_ppl", "layers"),
    "contexts": ("layers",),
    "projection": ("tokens", "iterations", "converged", "curve", "before", "after", "size"),
    "reconstruction": ("tokens",),
    "start": ("source", "val_ppl", "undistilled_val_ppl"),
    "reused": ("from", "created", "version", "machine"),
}
"""What a report reads of a record."""
TAKEN_FIELDS = dict.fromkeys(("tokens", "steps", "seconds"), NUMBER) | {"hash": TEXT}
"""What a row must say that is taken over: a report does without."""
FAILED_FIELDS = {"model": TEXT, "seed": NUMBER, "error": TEXT}


def write_results(folder: Path, results: Results) -> Path:
    """Writes results.json so that a reader sees the old file or the new one, never half of one."""
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(finite(results), indent=1, allow_nan=False, ensure_ascii=False))
    return path


def finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN (a diverged run has them): they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(folder: Path) -> Results:
    """Reads and checks results.json of a compare folder (or the file itself)."""
    path = folder if folder.is_file() else folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a `newllm compare` run")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        advice = (
            "perhaps cut off: move it and its reports away and start the compare command again, finished runs are kept"
            if path.name == FILE_NAME
            else "give a results.json written by `newllm compare`"
        )
        raise UserError(f"{path} is not valid JSON ({error.msg.lower()} at line {error.lineno}), {advice}") from error
    except (ValueError, RecursionError) as error:  # other bytes, a number of thousands of digits, brackets without end
        raise UserError(
            f"{path} is not text that a comparison has written: give a results.json written by `newllm compare`"
        ) from error
    _check_fields(results, TOP_FIELDS, f"{path} is not a result of `newllm compare`: the file")
    seen: dict[tuple[str, float], int] = {}
    for index, row in enumerate(results["rows"]):
        where = check_row(row, f"{path}: row {index}")
        if (first := seen.setdefault((row["model"], row["seed"]), index)) != index:
            raise UserError(f"{where} is the same run as row {first}: keep one of them")
    for index, failure in enumerate(results["failed"]):
        _check_fields(failure, FAILED_FIELDS, f"{path}: failed run {index}")
    return results


def check_row(row: Any, where: str) -> str:
    """Raises UserError for what a report cannot be made of; returns `where` with the run's name."""
    _check_fields(row, ROW_FIELDS, where)
    where += f" ({row['model']}, seed {row['seed']})"
    given = {key: kind for key, kind in NULLABLE_ROW_FIELDS.items() if row.get(key) is not None}
    _check_fields(row, given, where)
    for key, keys in RECORD_KEYS.items():
        if missing := [name for name in keys if row.get(key) and name not in row[key]]:
            raise UserError(f"{where}: '{key}' has no '{missing[0]}'")
    for key, fields in ITEM_FIELDS.items():
        for number, item in enumerate(row.get(key) or []):
            _check_fields(item, fields, f"{where}: item {number} of '{key}'")
    return where


def check_taken_row(row: Any, where: str) -> None:
    """Raises UserError for a row that a comparison cannot take over, from another one or from its own run folder."""
    _check_fields(row, TAKEN_FIELDS, check_row(row, where))


def _check_fields(record: Any, fields: dict[str, str], where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where} must be an object, not {type(record).__name__}")
    for key, kind in fields.items():
        if key not in record:
            raise UserError(f"{where} has no '{key}'")
        value = record[key]
        no_number = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
        if not isinstance(value, PYTHON_TYPES[kind]) or (kind == NUMBER and no_number):
            raise UserError(f"{where} has '{key}' = {str(value)[:40]!r}: it must be {kind}")
