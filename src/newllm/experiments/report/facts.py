"""What a comparison is about: its text, budget, shape, seeds and machine, in words."""

from __future__ import annotations

from collections import Counter
from typing import Any

from newllm.experiments.figures import mean_figure
from newllm.experiments.report.words import amount, count, join
from newllm.experiments.results import Results

CORPUS_TITLES = {"shakespeare": "Shakespeare's plays", "pile": "the Pile"}


def facts(results: Results) -> list[tuple[str, str]]:
    """What was compared, on which text, under which budget, where and when; (label, text)."""
    settings, machine = results["settings"], results["machine"]
    seeds = sorted({row["seed"] for row in results["rows"]})
    rows = [
        ("Text", _text(results)),
        ("Scored", _scored(results)),
        ("Budget", _budget(settings, results["rows"])),
        ("First phase", _first_phases(results["rows"])),
        ("Started from", _starts(settings, results["rows"])),
        ("Shape", _shape(settings)),
        ("Seeds", f"{count(len(seeds), 'seed')}: {', '.join(map(str, seeds))}" if seeds else ""),
        ("Machine", _machine(machine)),
        ("Taken over", _taken_over(results["rows"])),
        ("Made", f"{results['created'][:16].replace('T', ' ')} with newllm {results['version']}"),
    ]
    return [(label, text) for label, text in rows if text]


def short_facts(results: Results) -> list[str]:
    """Budget, seeds, machine and date in a few words each, for the line under the title."""
    rows = results["rows"]
    tokens = [row["tokens"] for row in rows if row.get("tokens")]
    seeds = len({row["seed"] for row in rows})
    machine = results["machine"]
    return [
        *([f"{_span(tokens)} training tokens each"] if tokens else []),
        *([count(seeds, "seed")] if seeds else []),
        *([_processor(machine)] if machine.get("cpu") else []),
        results["created"][:10],
    ]


def corpus(results: Results) -> str:
    name = str(results["data"].get("corpus") or results["settings"].get("data", ""))
    return CORPUS_TITLES.get(name, name)


def _text(results: Results) -> str:
    data = results["data"]
    said = [corpus(results)]
    for split, counts in (data.get("splits") or {}).items():
        said.append(f"{split} {amount(counts['documents'], 'document')}, {counts['tokens']:,} tokens")
    if data.get("tokenizer"):
        said.append(str(data["tokenizer"]))
    overlap = data.get("overlap") or {}
    if overlap.get("test") is not None:
        said.append(f"{overlap['test']:.2%} of the test split's {overlap['ngram_words']}-word sequences occur in train")
    return "; ".join(said)


def _scored(results: Results) -> str:
    """How much of the test split the perplexity is of, where --eval-tokens limits it."""
    limit = results["settings"].get("eval_tokens")
    available = ((results["data"].get("splits") or {}).get("test") or {}).get("tokens")
    if not limit or not available or available <= limit:
        return ""
    scored = max((row["test_tokens"] for row in results["rows"] if row.get("test_tokens")), default=limit)
    return f"{scored:,} of {available:,} test tokens (--eval-tokens)"


def _budget(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if settings.get("max_tokens"):
        said = [f"{settings['max_tokens']:,} training tokens for each model"]
    else:
        samples = f"{settings['samples']:,} windows" if settings.get("samples") else "the training split"
        said = [f"{settings.get('epochs') or 1:g} × {samples}"]
        if tokens := [row["tokens"] for row in rows if row.get("tokens")]:
            said.append(f"{_span(tokens)} tokens")
    if settings.get("seq_length") and settings.get("batch_size"):
        batch = settings["batch_size"] * settings.get("gradient_accumulation", 1)
        said.append(f"{batch} windows of {settings['seq_length']} tokens in a step")
    if settings.get("lr"):
        said.append(f"AdamW, peak learning rate {settings['lr']:g}")
    return "; ".join(said)


def _first_phases(rows: list[dict[str, Any]]) -> str:
    """What some models were trained on before the budget began."""
    tokens: dict[str, list[int]] = {}
    for row in rows:
        if row.get("reconstruction"):
            tokens.setdefault(row["model"], []).append(row["reconstruction"]["tokens"])
    said = [f"{model}: reconstruction, {_span(counts)} more tokens" for model, counts in tokens.items()]
    streams: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("projection"):
            streams.setdefault(row["model"], []).append(row["projection"])
    for model, records in streams.items():
        iterations = _span([record["iterations"] for record in records])
        said.append(f"{model}: {iterations} iterations over {records[0]['tokens']:,} tokens")
    return "; ".join(said)


def _starts(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """'pythia-small-0; validation perplexity before training: pythia 58.12, mla 75.20', or nothing.

    With distillation it is given before that and after.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("start"):
            found.setdefault(row["model"], []).append(row["start"])
    if not found:
        return ""
    said = []
    for model, starts in found.items():
        ppl = mean_figure((start["val_ppl"] for start in starts), 2)
        distilled = any(start["undistilled_val_ppl"] is not None for start in starts)
        before = mean_figure((start["undistilled_val_ppl"] for start in starts), 2) + " → " if distilled else ""
        said.append(f"{model} {before}{ppl}")
    sources = join(list(dict.fromkeys(start["source"] for starts in found.values() for start in starts)))
    tokens = settings.get("distil_tokens")
    distillation = f" (→ after distillation on {tokens:,} more tokens)" if tokens else ""
    return f"{sources}; validation perplexity before training{distillation}: {', '.join(said)}"


def _span(counts: list[int]) -> str:
    """'2,560', or '2,560 to 5,120' where seeds differ."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _shape(settings: dict[str, Any]) -> str:
    said = {
        "num_layers": lambda n: amount(n, "layer"),
        "hidden_size": lambda n: f"{n:,} wide",
        "num_heads": lambda n: amount(n, "head"),
        "intermediate_size": lambda n: f"{n:,} in the MLP",
    }
    return ", ".join(say(settings[key]) for key, say in said.items() if settings.get(key))


def _taken_over(rows: list[dict[str, Any]]) -> str:
    """'9 of 48 runs: 9 from caches.json (2026-11-24, AMD EPYC, 2 cores, newllm 0.1.0)', or nothing."""
    origins = Counter(
        f"{origin['from']} ({origin['created'][:10]}, {_processor(origin['machine'])}, newllm {origin['version']})"
        for row in rows
        if (origin := row.get("reused"))
    )
    named = [f"{amount} from {origin}" for origin, amount in origins.items()]
    return f"{origins.total()} of {len(rows)} runs: {join(named)}" if named else ""


def _processor(machine: dict[str, Any]) -> str:
    """'AMD EPYC, 2 cores', or the name of the GPU."""
    cores = f", {machine['cores']} cores" if machine.get("cores") and not machine.get("gpu") else ""
    return f"{machine.get('gpu') or machine.get('cpu') or 'unknown machine'}{cores}"


def _machine(machine: dict[str, Any]) -> str:
    """Every entry that was recorded; sizes in bytes as GiB."""
    said = []
    for key, value in machine.items():
        name = key.removesuffix("_bytes").replace("_", " ")
        if value is None:
            continue
        if key.endswith("_bytes"):
            said.append(f"{value / 2**30:.0f} GiB {name}")
        elif key in ("cpu", "gpu", "system"):
            said.append(str(value))
        elif isinstance(value, bool):
            said.append(name if value else f"no {name}")
        elif isinstance(value, int):
            said.append(f"{value} {name}")
        else:
            said.append(f"{name} {value}")
    return ", ".join(said)
