"""Which of the committed comparisons may be set side by side: those whose text, budget, shape and windows agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pareto_plot import front

from newllm.errors import UserError
from newllm.experiments.columns import ALL_COLUMNS, LEAD
from newllm.experiments.report.words import count
from newllm.experiments.results import Results, Row, read_results
from newllm.experiments.statistics import Estimate
from newllm.experiments.summary import ModelSummary, summarise

CACHE, STATE = ALL_COLUMNS["cache_bytes_per_token"], ALL_COLUMNS["state_bytes"]
REPEATED, DECODING = ALL_COLUMNS["recall.repeated"], ALL_COLUMNS["decode_ms_per_token"]
# Attention to everything, which every cache is measured against: the same model in two classes, as fast as each other.
REFERENCES = ("pythia", "discrete")
WORST = 2.0  # times the reference's perplexity; a model worse than that is no choice, however small its cache
FIRST_PHASES = ("reconstruction", "projection")


@dataclass(frozen=True)
class Comparison:
    """A committed results.json, and the terms it was made on."""

    name: str
    results: Results

    @property
    def tokens(self) -> int | None:
        """The budget: what the baseline was trained on."""
        rows = self.results["rows"]
        return next((row.get("tokens") for row in rows if row["model"] == self.results["baseline"]), None)

    @property
    def terms(self) -> dict[str, str]:
        """In words, each by itself: comparisons whose words are the same are one."""
        s, data = self.results["settings"], self.results["data"]
        batch = s["batch_size"] * s.get("gradient_accumulation", 1) * s["seq_length"]
        tasks = {name: s.get(f"{name}_share", 0) for name in ("recall", "reversal")}
        optimiser = ("min_lr_ratio", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm")
        sizes = {split: counts["tokens"] for split, counts in data["splits"].items()}
        return {
            "shape": f"{count(s['num_layers'], 'layer')}, {s['hidden_size']} wide, {count(s['num_heads'], 'head')}, "
            f"{s['intermediate_size']:,} in the MLP",
            "text": f"{data['corpus']} ({sizes['train']:,} tokens to train on, {sizes['test']:,} to test), "
            f"{data['vocab_size']:,} words",
            "budget": f"{self.tokens or 0:,} tokens, {batch:,} in a step"
            + "".join(f", {share:.0%} of the steps on {task}" for task, share in tasks.items() if share)
            + (", streaming" if s.get("streaming") else "")
            + (f", from the weights of {Path(s['start_from']).name}" if s.get("start_from") else ""),
            "optimiser": f"peak learning rate {s['lr']:g}; "
            + ", ".join(f"{key} {s[key]:g}" for key in optimiser if key in s),
            "windows": f"windows of {s['seq_length']} tokens, {s.get('eval_tokens') or sizes['test']:,} tokens scored, "
            f"a cache of {s['decode_context']:,} tokens",
        }


@dataclass(frozen=True)
class Choice:
    """A model on the plot."""

    summary: ModelSummary
    megabytes: float  # of cache for one sequence of decode_context tokens
    speed: float | None  # time to decode a token / the reference's in the same session
    aside: str  # why it takes no part in the front; "" if it does

    def value(self, measure: str) -> Estimate | None:
        if measure == "speed":
            return None if self.speed is None else Estimate(self.speed, None, 1)
        return self.summary.values[{"ppl": LEAD, "recall": REPEATED}[measure].key]


@dataclass(frozen=True)
class Group:
    """Comparisons on the same terms, as one."""

    comparisons: list[Comparison]
    reference: str
    choices: list[Choice]
    left_out: list[str]

    def front(self, measure: str) -> set[str]:
        """The models of which no other has less cache and a better value, one of them strictly; of the means."""
        places = {
            c.summary.model: (c.megabytes, value.mean)
            for c in self.choices
            if not c.aside and (value := c.value(measure)) is not None
        }
        return {model for model, place in places.items() if place in front(list(places.values()))}


def read(folder: Path) -> tuple[list[Comparison], list[str]]:
    """The comparisons of a folder, oldest first, and what is none."""
    found, refused = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(Comparison(path.stem, read_results(path)))
        except UserError:
            refused.append(f"{path.name}: no result of `newllm compare`")
    return sorted(found, key=lambda comparison: comparison.results["created"]), refused


def together(comparisons: list[Comparison]) -> Group | None:
    """Comparisons on the same terms as one; None where there is no reference, or nothing to set beside it.

    A run that two of them hold is taken from the later.
    """
    rows: dict[tuple[str, int], Row] = {}
    left_out = []
    for comparison in comparisons:
        for row in comparison.results["rows"]:
            run = row["model"], row["seed"]
            if row.get("tokens") != comparison.tokens:
                left_out.append(f"`{run[0]}`, seed {run[1]}: trained on {row.get('tokens') or 0:,} tokens")
                continue
            if run in rows and rows[run].get("hash") != row.get("hash"):
                left_out.append(f"`{run[0]}`, seed {run[1]}: an earlier run with other settings of its own")
            rows[run] = row
    reference = next((name for name in REFERENCES if any(model == name for model, _ in rows)), None)
    if reference is None:
        return None
    summaries = summarise({"rows": list(rows.values()), "baseline": reference})
    worth = next(summary.mean(LEAD) for summary in summaries if summary.model == reference) or math.inf
    context = comparisons[0].results["settings"]["decode_context"]
    speeds = relative_speeds(comparisons)
    choices = []
    for summary in summaries:
        per_token, state = summary.mean(CACHE), summary.mean(STATE)
        if not summary.valid:
            left_out.append(f"`{summary.model}`: INVALID, it fails a check without which its figures mean nothing")
        elif summary.values[LEAD.key] is None:
            left_out.append(f"`{summary.model}`: its perplexity is not a finite number")
        elif (ppl := summary.mean(LEAD)) is not None and ppl > WORST * worth:
            left_out.append(f"`{summary.model}`: perplexity {ppl:,.0f}, more than {WORST:g} times `{reference}`'s")
        elif per_token is None or state is None:
            left_out.append(f"`{summary.model}`: bytes of cache were not measured")
        else:
            megabytes = (per_token * context + state) / 1e6
            choices.append(Choice(summary, megabytes, speeds.get(summary.model), first_phase(summary)))
    if len(choices) < 2:
        return None
    choices.sort(key=lambda choice: (choice.megabytes, choice.summary.mean(LEAD)))
    return Group(comparisons, reference, choices, left_out)


def first_phase(summary: ModelSummary) -> str:
    """What a model has read besides the budget."""
    tokens = [row[phase]["tokens"] for row in summary.rows for phase in FIRST_PHASES if row.get(phase)]
    return f"a first phase on {max(tokens):,} more tokens, not in the budget of the others" if tokens else ""


def relative_speeds(comparisons: list[Comparison]) -> dict[str, float]:
    """Time to decode a token over the reference's of the same session, whose machine was as busy; mean of sessions."""
    ratios: dict[str, list[float]] = {}
    for comparison in comparisons:
        times = {s.model: time for s in summarise(comparison.results) if (time := s.mean(DECODING)) is not None}
        reference = next((times[name] for name in REFERENCES if name in times), None)
        for model, time in times.items() if reference else ():
            ratios.setdefault(model, []).append(time / reference)
    return {model: fmean(values) for model, values in ratios.items()}


def grouped(comparisons: list[Comparison]) -> tuple[list[Group], list[str]]:
    """Groups, the one of most models first, and why other comparisons are on no plot."""
    by_terms: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons:
        by_terms.setdefault(tuple(comparison.terms.values()), []).append(comparison)
    groups = sorted(filter(None, map(together, by_terms.values())), key=lambda group: -len(group.choices))
    shown = {comparison.name for group in groups for comparison in group.comparisons}
    missing = []
    for comparison in comparisons:
        if comparison.name not in shown:
            measured = any(row.get("cache_bytes_per_token") is not None for row in comparison.results["rows"])
            why = [] if measured else ["bytes and speed were not measured"]
            if groups:
                terms = groups[0].comparisons[0].terms
                why += [words.split(";")[0] for key, words in comparison.terms.items() if words != terms[key]]
            else:
                why += ["no reference to compare with"] if measured else []
            missing.append(f"[{comparison.name}](experiments/{comparison.name}.md): {'; '.join(why)}")
    return groups, missing
