"""The report's section on selective output: perplexity as the gates weigh it, beside that of all tokens."""

from __future__ import annotations

from typing import Any

from newllm.experiments.figures import mean_figure
from newllm.experiments.summary import ModelSummary, rows_of

KEY = "selective"


def selective_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """A row for each valid model with such gates, best perplexity first; None where there is no such model."""
    return rows_of(summaries, KEY, cells)


def cells(records: list[dict[str, Any]]) -> list[str]:
    """Unweighted and weighted PPL, weight of a token, and of every pass: tokens emitted from it, PPL if it alone spoke.

    One record for each seed.
    """
    passes = range(1 + records[0]["max_skip"])
    return [
        mean_figure((record["ppl"] for record in records), 2),
        mean_figure((record["weighted_ppl"] for record in records), 2),
        mean_figure((record["weight"] for record in records), 3),
        "; ".join(mean_figure((100 * record["passes"][p]["emitted"] for record in records), 1) for p in passes),
        "; ".join(mean_figure((record["passes"][p]["ppl"] for record in records), 2) for p in passes),
    ]
