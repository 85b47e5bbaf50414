"""report.html (one file, opens offline) and report.md of a comparison, both made from results.json alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from newllm.errors import UserError, first_line
from newllm.experiments.columns import COST_COLUMNS, EXACT, LEAD, MAIN_COLUMNS, PERPLEXITY_COLUMNS, Column
from newllm.experiments.figures import difference_percent, figure, number
from newllm.experiments.report import facts, findings, words
from newllm.experiments.report.contexts import contexts_section
from newllm.experiments.report.memories import memories_section
from newllm.experiments.report.plots import all_plots, position_estimates
from newllm.experiments.report.projection import projection_plots, projection_section
from newllm.experiments.report.recall import recall_plots, recall_section
from newllm.experiments.report.recurrence import recurrence_plots, recurrence_section
from newllm.experiments.report.reversal import reversal_plots, reversal_section
from newllm.experiments.report.selective import selective_section
from newllm.experiments.results import FILE_NAME, Results, Row, read_results
from newllm.experiments.summary import ModelSummary, best_models, decimals, ranked, summarise
from newllm.training.checkpoints import write_whole


def write_report(folder: Path, *, checked: bool = False) -> Path:
    """Reads results.json of a compare folder, or named itself; writes report.md and report.html beside it.

    Returns the path of the latter. Whoever has the page open while a comparison goes on, and whoever finds it after a
    kill or a full disk, sees all of it. Raises UserError for figures that somebody has edited into something else,
    unless they are known to be as a comparison has measured them.
    """
    results = read_results(folder)
    if not checked:
        check_shown(results, str(folder))
    if folder.is_file():
        if folder.name != FILE_NAME:
            raise UserError(f"{folder}: give the folder of a comparison, or its {FILE_NAME}")
        folder = folder.parent
    context = report_context(results, summarise(results))
    for name in ("report.md", "report.html"):
        write_whole(folder / name, _template(name).render(context))
    return folder / "report.html"


def check_shown(results: Results, where: str) -> None:
    """Raises UserError for what no report can be made of: what it says of itself, a row, or rows side by side."""
    _refuse_edited(results | {"rows": []}, {}, ("settings", "machine", "data"), where)
    for index, row in enumerate(results["rows"]):
        check_shown_row(row, f"{where}: row {index} ({row['model']}, seed {row['seed']})")
    _refuse_edited(results, {}, (), f"{where}: rows side by side")


def check_shown_row(row: Row, where: str) -> None:
    """Raises UserError for a row of which no report can be made, though it has what `check_row` asks for: somebody has
    put something else into one of its records."""
    blank = dict.fromkeys(("name", "command", "created", "version"), "") | {"baseline": row["model"], "failed": []}
    blank |= {"settings": {}, "machine": {}, "data": {}}
    _refuse_edited(blank, row, [key for key, value in row.items() if isinstance(value, dict | list)], where)


def _refuse_edited(results: Results, row: Row, keys: Iterable[str], where: str) -> None:
    """Raises UserError if results, with a row if there is one, make no report; names the key without which they do."""

    def trouble(without: str = "") -> Exception | None:
        if row:
            shown = results | {"rows": [row | ({without: None} if without else {})]}
        else:
            shown = results | ({without: {}} if without else {})
        try:
            _template("report.md").render(report_context(shown, summarise(shown)))
        except Exception as error:  # whatever a wrong value leads to
            return error
        return None

    if (error := trouble()) is None:
        return
    named = next((f"'{key}' in it" for key in keys if trouble(key) is None), "something in it")
    what = f"{type(error).__name__}: {first_line(error)}"
    raise UserError(f"{where}: {named} is not as a comparison has written it ({what})")


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": markdown_cell, "breakable": breakable, "fence": markdown_fence}
    return environment.from_string(_asset(f"template{Path(name).suffix}"))


def report_context(results: Results, summaries: list[ModelSummary]) -> dict[str, Any]:
    """Everything both templates show."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    figures = all_plots(summaries) | {name: plot for name, plot in recall_plots(summaries).items() if plot}
    figures |= reversal_plots(summaries) | recurrence_plots(summaries) | projection_plots(summaries)
    browser_data = {
        "models": [{"name": s.model, "baseline": s.is_baseline, "valid": s.valid} for s in summaries],
        "figures": figures,
    }
    check_names = list(dict.fromkeys(c["name"] for s in summaries for row in s.rows for c in row["checks"]))
    return {
        "results": results,
        "title": f"{words.capitalised(words.count(len(summaries), 'language model'))} on {facts.corpus(results)}",
        "headline": findings.headline(results, summaries),
        "findings": findings.findings(results, summaries),
        "facts": facts.facts(results),
        "short_facts": facts.short_facts(results),
        "models": summaries,
        "table": table(summaries, MAIN_COLUMNS),
        "differences": difference_rows(summaries),
        "perplexity": table(summaries, PERPLEXITY_COLUMNS),
        "costs": table(summaries, COST_COLUMNS),
        "positions": position_table(summaries),
        "recall": recall_section(summaries),
        "reversal": reversal_section(summaries),
        "recurrence": recurrence_section(summaries),
        "projection": projection_section(summaries),
        "selective": selective_section(summaries),
        "memories": memories_section(summaries),
        "contexts": contexts_section(summaries),
        "check_names": check_names,
        "checks": [check_row(summary, check_names) for summary in summaries],
        "samples": [(s.model, s.valid, s.rows[0]["sample"]) for s in summaries if s.rows[0].get("sample")],
        "config": yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True),
        "figures": figures,
        # "<" could otherwise end the script element.
        "data": Markup(json.dumps(browser_data, ensure_ascii=False).replace("<", "\\u003c")),
        "style": Markup(_asset("style.css")),
        "script": Markup(_asset("report.js")),
        "plotly": Markup(get_plotlyjs()),
    }


def breakable(model: str) -> Any:
    """A model's name that may wrap after the separators of its options."""
    from markupsafe import Markup, escape

    text = str(escape(model))
    for separator in (":", ",", "_"):
        text = text.replace(separator, separator + "<wbr>")
    return Markup(text)


def table(summaries: list[ModelSummary], columns: list[Column]) -> dict[str, Any]:
    """The columns that were measured, and for each model its cells: text, interval, sort value, mark, difference."""
    columns = [column for column in columns if any(s.mean(column) for s in summaries)]
    best = {column.key: best_models(summaries, column) for column in columns}
    places = {column.key: decimals(summaries, column) for column in columns}
    varying = {column.key for column in columns if len({s.mean(column) for s in summaries}) > 1}
    rows = []
    for summary in ranked(summaries):
        cells = []
        for column in columns:
            value = summary.values[column.key]
            cells.append(
                {
                    "text": number(value.mean, places[column.key]) if value else "—",
                    "interval": number(value.half_width, places[column.key]) if value and value.half_width else "",
                    "full": figure(value, places[column.key]),
                    "sort": value.mean if value else None,
                    "best": summary.model in best[column.key],
                    **_difference_cell(summary, column, column.key in varying),
                }
            )
        rows.append({"summary": summary, "cells": cells})
    return {"columns": columns, "rows": rows}


def _difference_cell(summary: ModelSummary, column: Column, varying: bool) -> dict[str, Any]:
    """The small line under a value, and whether it shows a better or a worse figure than the baseline's."""
    difference = summary.differences[column.key]
    if difference is None or not varying:
        return {"difference": "", "tone": ""}
    if difference.verdict == "same" or difference.percent.mean == 0:
        return {"difference": "same", "tone": ""}
    shown = column.better and (column.key in EXACT or difference.deciding.excludes_zero)
    direction = "lower" if difference.deciding.mean < 0 else "higher"
    tone = ("better" if direction == column.better else "worse") if shown else ""
    return {"difference": difference_percent(difference), "tone": tone}


def difference_rows(summaries: list[ModelSummary]) -> list[dict[str, Any]]:
    """The paired comparison of test perplexity and bits per byte with the baseline, in absolute numbers and percent."""
    rows = []
    for summary in ranked(summaries):
        difference = summary.differences[LEAD.key]
        if difference is None:
            continue
        absolute, bits = difference.absolute, summary.differences["test_bits_per_byte"]
        rows.append(
            {
                "model": summary.model,
                "seeds": difference.absolute.count,
                "absolute": number(absolute.mean, 2, True) if difference.wide else figure(absolute, 2, True),
                "percent": difference_percent(difference),
                "bits": figure(bits.absolute if bits else None, 4, signed=True),
                "verdict": difference.verdict,
                "wide": difference.wide,
                "sort": difference.absolute.mean,
            }
        )
    return rows


def position_table(summaries: list[ModelSummary]) -> dict[str, Any]:
    """Perplexity by position as text, for readers who want the figures behind the plot."""
    by_model = {s.model: position_estimates(s) for s in summaries}
    ranges = list(dict.fromkeys(name for values in by_model.values() for name in values))
    rows = []
    for summary in ranked(summaries):
        cells = [figure(by_model[summary.model].get(name), 2) for name in ranges]
        rows.append({"model": summary.model, "valid": summary.valid, "cells": cells})
    return {"ranges": ranges, "rows": rows if ranges else []}


def check_row(summary: ModelSummary, names: list[str]) -> dict[str, Any]:
    """Whether a model passed each check with every seed; what went wrong where it did not; its perplexity band."""
    outcomes, problems = [], []
    for name in names:
        found = [(row["seed"], check) for row in summary.rows for check in row["checks"] if check["name"] == name]
        failed = [(seed, check) for seed, check in found if check["passed"] is False]
        passed = bool(found) and all(check["passed"] for _, check in found)
        outcomes.append("fail" if failed else "pass" if passed else "not judged")
        if failed:
            seeds = words.join([str(seed) for seed, _ in failed])
            problems.append(f"{name}, seed{'s' if len(failed) > 1 else ''} {seeds}: {failed[0][1]['detail']}")
    details = [f"{check['name']}: {check['detail']}" for check in summary.rows[0]["checks"]]
    band = summary.rows[0].get("ppl_band") or {}
    return {
        "summary": summary,
        "outcomes": outcomes,
        "problems": problems,
        "alarm": "" if summary.valid else findings.why_invalid(summary),
        "details": details,
        "band": band.get("band", "—"),
        "advice": band.get("advice", ""),
    }


def markdown_cell(text: object) -> str:
    """Text that cannot break a Markdown table or start HTML."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "\\`")
    return " ".join(escaped.replace("*", "\\*").replace("_", "\\_").split())


def markdown_fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
