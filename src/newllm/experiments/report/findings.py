"""What the numbers say, in careful words: computed, so that no sentence claims more than its interval allows."""

from __future__ import annotations

from newllm.experiments.columns import ALL_COLUMNS, LEAD, PERPLEXITY_COLUMNS
from newllm.experiments.figures import difference_percent, figure, number
from newllm.experiments.report import recall, recurrence, reversal
from newllm.experiments.report.words import capitalised, count, join
from newllm.experiments.results import Results, Row
from newllm.experiments.summary import ModelSummary, competitors, decimals, measured

STATE = ALL_COLUMNS["state_bytes"]
CACHE = ALL_COLUMNS["cache_bytes_per_token"]
TRAINING = ALL_COLUMNS["train_tokens_per_second"]
DECODING = ALL_COLUMNS["decode_ms_per_token"]


def headline(results: Results, summaries: list[ModelSummary]) -> str:
    """One sentence: which model has the lowest perplexity, and whether that is a difference to the baseline."""
    shown = competitors(summaries)
    if not shown:
        return "There is no valid result: every run failed, diverged or is INVALID (see the checks)."
    best, places = shown[0], decimals(summaries, LEAD)
    value = figure(best.values[LEAD.key], places)
    if len(shown) == 1:
        return f"{best.model} reaches a test perplexity of {value}."
    if best.is_baseline:
        return f"None of the other models has a lower test perplexity than the baseline {best.model}: {value}."
    lead = f"{best.model} has the lowest test perplexity, {value}"
    difference = best.differences[LEAD.key]
    if difference is None:
        return f"{lead}; the baseline {results['baseline']} has no valid result to compare it with."
    gap = difference_percent(difference)
    size = gap.lstrip("+−") + (" lower than" if difference.deciding.mean < 0 else " higher than")
    size = f"{gap} against" if difference.wide else size
    if difference.absolute.half_width is None:
        alone = all(len(s.rows) == 1 for s in summaries if s is best or s.is_baseline)
        runs = "in a single run each" if alone else "with the one seed they share"
        return f"{lead}, {size} the baseline {results['baseline']}, {runs}."
    if difference.verdict == "no difference shown":
        return f"{lead}, but no difference to the baseline {results['baseline']} is shown ({gap})."
    return f"{lead}: {size} the baseline {results['baseline']}."


def findings(results: Results, summaries: list[ModelSummary]) -> list[tuple[str, str]]:
    """(topic, sentences) for quality, memory, speed and how far the numbers carry."""
    shown = competitors(summaries)
    parts = [
        ("Quality", " ".join(filter(None, (_quality(shown), _not_finite(summaries), _partly_finite(summaries))))),
        ("Memory", _memory(shown)),
        ("Recall", _recall(shown)),
        ("Reversal", _reversal(shown)),
        ("Recurrence", _recurrence(shown)),
        ("Speed", _speed(results, shown)),
        ("Checks", _checks(results, summaries)),
        ("How sure", _certainty(summaries, shown)),
    ]
    return [(topic, text) for topic, text in parts if text]


def _quality(shown: list[ModelSummary]) -> str:
    groups: dict[str, list[str]] = {}
    for summary in shown:
        if difference := summary.differences[LEAD.key]:
            named = f"{summary.model} ({difference_percent(difference)})"
            groups.setdefault(difference.verdict, []).append(named)
    texts = {
        "lower": "Lower perplexity than the baseline",
        "higher": "Higher perplexity than the baseline",
        "same": "Exactly the same",
        "no difference shown": "No difference shown (the interval includes zero)",
        "one seed: cannot tell": "With one seed shared with the baseline, and so without an interval",
    }
    said = [f"{text}: {join(groups[verdict])}." for verdict, text in texts.items() if verdict in groups]
    return " ".join(said)


def _not_finite(summaries: list[ModelSummary]) -> str:
    """Seeds that have come apart; no mean has them, so that they must be told."""
    lost = {s.model: len(s.rows) - len(s.by_seed(LEAD)) for s in summaries if s.valid}
    named = [f"{s.model} ({lost[s.model]} of {count(len(s.rows), 'seed')})" for s in summaries if lost.get(s.model)]
    return f"Without a finite perplexity, and in no mean: {join(named)}." if named else ""


def _partly_finite(summaries: list[ModelSummary]) -> str:
    """Other perplexities that some of a model's seeds have not, for which their means are those of the better seeds."""
    said = []
    for summary in summaries:
        rows = [_perplexities(row) for row in summary.rows if summary.valid and LEAD.get(row) is not None]
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            if 0 < (lost := values.count(None)) < len(values):
                said.append(f"{summary.model} ({name}, {lost} of {count(len(values), 'seed')})")
    return f"Not finite with every seed, so that the mean is of the others: {join(said)}." if said else ""


def _perplexities(row: Row) -> dict[str, float | None]:
    """All of a row but the one that leads, by what they are called; None where one came out infinite."""
    columns = [column for column in PERPLEXITY_COLUMNS if column is not LEAD and column.key.partition(".")[0] in row]
    found: dict[str, float | None] = {column.label: column.get(row) for column in columns}
    found |= {f"tokens {item['from']}–{item['to']}": item.get("ppl") for item in row.get("ppl_by_position") or []}
    if record := row.get(recurrence.KEY):
        found |= {f"k = {entry['passes']}": entry["ppl"] for entry in record["passes"]}
        found["true recurrence"] = record["ppl"]
    return found


def _memory(shown: list[ModelSummary]) -> str:
    sized = [(size, s) for s in shown if (size := s.mean(CACHE)) is not None]
    if not sized:
        return ""
    low, high = min(size for size, _ in sized), max(size for size, _ in sized)
    if low == high:
        each = "It keeps" if len(sized) == 1 else "Every model keeps"
        return f"{each} {number(low, 0)} bytes of cache for each token of the context."
    smallest = [s for size, s in sized if size == low]
    best = smallest[0]  # `shown` is ranked: of equal caches, the one with the lowest perplexity
    if low == 0:
        text = (
            f"{best.model} keeps no cache that grows with the context ({number(best.mean(STATE) or 0, 0)} bytes in all)"
        )
    else:
        text = f"The smallest cache is {best.model}'s: {number(low, 0)} bytes per token"
    baseline = next((size for size, s in sized if s.is_baseline), None)
    if baseline and baseline > low > 0:
        text += f", {100 * low / baseline:.3g} % of the baseline's {number(baseline, 0)}"
    difference = best.differences[LEAD.key]
    if difference is not None:
        text += f", with {difference_percent(difference)} perplexity"
        if difference.verdict == "no difference shown":
            text += " (no difference shown)"
    return text + "."


def _recall(shown: list[ModelSummary]) -> str:
    """The greatest distance, best first; with how much is left when a model's memories are taken away."""
    asked = measured(shown, recall.KEY)
    if not asked:
        return ""
    place = max(recall.distances(asked[0]))
    found = [(value.mean, s) for s in asked if (value := recall.accuracy(s, place))]
    said = []
    for mean, summary in sorted(found, key=lambda pair: -pair[0]):
        zeroed = recall.accuracy(summary, place, "zeroed")
        without = f" ({number(zeroed.mean, 0)} % with its memories zeroed)" if zeroed else ""
        said.append(f"{summary.model} {number(mean, 0)} %{without}")
    guessing = number(100 * recall.settings(asked)["chance"], 1)
    return f"Questions answered {count(place, 'segment')} after the fact: {join(said)}. Guessing: {guessing} %."


def _reversal(shown: list[ModelSummary]) -> str:
    """What is known backward of facts that were told forward; in the words of the models' verdicts."""
    asked = measured(shown, reversal.KEY)
    if not asked:
        return ""
    groups: dict[str, list[str]] = {}
    for summary in asked:
        auc = figure(reversal.auc(summary), 3)
        told = number(reversal.exact(summary, "forward", "forward").mean, 0)
        groups.setdefault(reversal.verdict(summary), []).append(f"{summary.model} (forward {told} %, AUC {auc})")
    said = " ".join(f"{capitalised(what)}: {join(models)}." for what, models in groups.items())
    return f"Facts told in one direction and asked in the other, where an AUC of 0.5 is guessing. {said}"


def _recurrence(shown: list[ModelSummary]) -> str:
    """What states of a discrete pass make of a model that feeds a state back, beside what it is by itself."""
    said = []
    for summary in measured(shown, recurrence.KEY):
        fewest = recurrence.numbers([summary])[0]
        first, truth = recurrence.after(summary).get(fewest), recurrence.true(summary)
        if first and truth:
            said.append(f"{summary.model} {number(first.mean, 2)} and {number(truth.mean, 2)}")
    if not said:
        return ""
    return (
        "Perplexity with states of a discrete pass, and by true recurrence, which is the one that counts: "
        f"{'; '.join(said)}."
    )


def _speed(results: Results, shown: list[ModelSummary]) -> str:
    said = []
    for column, verb, fastest in ((DECODING, "decodes", min), (TRAINING, "trains", max)):
        timed = [(mean, s) for s in shown if (mean := s.mean(column)) is not None]
        if len(timed) < 2:
            continue
        places = decimals(shown, column)
        mean, best = fastest(timed, key=lambda pair: pair[0])
        text = f"{best.model} {verb} fastest: {number(mean, places)} {column.unit}"
        if column is DECODING and (context := results["settings"].get("decode_context")):
            text += f" with {number(context, 0)} tokens of context"
        baseline = next((value for value, s in timed if s.is_baseline), None)
        said.append(
            text + (f" (baseline {number(baseline, places)})" if baseline and not best.is_baseline else "") + "."
        )
    return " ".join([*said, "Timings belong to this machine and vary by some percent from run to run."]) if said else ""


def _checks(results: Results, summaries: list[ModelSummary]) -> str:
    said = []
    said += [f"{s.model}: INVALID. {why_invalid(s)}" for s in summaries if not s.valid]
    if failing := [f"{s.model} ({', '.join(failed_checks(s))})" for s in summaries if s.valid and failed_checks(s)]:
        said.append(f"A check that does not make the perplexity void failed for {join(failing)}; see below.")
    if unmeasured := [s.model for s in summaries if s.valid and not s.values[LEAD.key]]:
        said.append(f"{join(unmeasured)}: no test perplexity, the loss is not a finite number.")
    if not said and summaries:
        judged = all(check["passed"] for s in summaries for row in s.rows for check in row["checks"])
        said.append("Every model passes every check." if judged else "No check failed; not every one was judged.")
    if results["failed"]:
        said.append(f"{capitalised(count(len(results['failed']), 'run'))} failed; see below.")
    return " ".join(said)


def failed_checks(summary: ModelSummary) -> list[str]:
    """Names of the checks that failed with any seed."""
    checks = [check for row in summary.rows for check in row["checks"]]
    return list(dict.fromkeys(check["name"] for check in checks if check["passed"] is False))


def why_invalid(summary: ModelSummary) -> str:
    failed = failed_checks(summary)
    sees_ahead = "future" in {name.split(",")[0] for name in failed}
    leak = " It sees the tokens it should predict." if sees_ahead else ""
    return f"It fails: {', '.join(failed)}.{leak} Its perplexity means nothing and is left out of every comparison."


def _certainty(summaries: list[ModelSummary], shown: list[ModelSummary]) -> str:
    if not summaries:
        return ""
    most = max(len(s.rows) for s in summaries)
    if most == 1:
        return (
            "One seed for each model cannot tell small differences from chance: run several (--seeds 0 1 2) before "
            "believing a gap of a few percent."
        )
    said = [
        f"± is the 95 % interval of the mean over {most} seeds (Student's t). It covers initialisation and data order, "
        "not other texts, sizes or longer training."
    ]
    if any(difference and difference.wide for s in shown for difference in s.differences.values()):
        said.append(
            "In brackets, where an interval is wide: that of the geometric mean of the ratios. Ratios decide whether a "
            "difference is shown."
        )
    differences = [d for s in shown if (d := s.differences[LEAD.key])]
    compared = sum(d.absolute.half_width is not None for d in differences)
    if compared > 1:
        said.append(
            f"Differences are paired by seed. Each of the {count(compared, 'interval')} misses the true "
            "difference one time in twenty."
        )
    if fewer := [s.model for s in summaries if len(s.rows) < most]:
        said.append(f"Fewer seeds than the others: {join(fewer)}.")
    return " ".join(said)
