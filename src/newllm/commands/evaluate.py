"""`newllm evaluate`: measures a trained model again, on its own text or on another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from newllm.commands.folders import need_folder, open_model, plugin_of, run_config
from newllm.errors import UserError, nearest
from newllm.experiments.results import finite
from newllm.paths import model_folder
from newllm.resolution import resolve
from newllm.settings import RunSettings

TASKS = ["perplexity", "recall", "reversal", "recurrence", "efficiency"]
SPLITS = ["validation", "test"]


def settings_of(folder: Path, tasks: list[str]) -> RunSettings:
    """The settings a model was trained with; the defaults for a model folder without config.yaml.

    Raises:
        UserError: no such folder, or an unknown task.
    """
    for task in tasks:
        if task not in TASKS:
            raise nearest(task, TASKS, "task")
    need_folder(folder)
    return RunSettings(**run_config(folder))


def evaluate(
    folder: Path, tasks: list[str], settings: RunSettings, cache_precisions: list[str] | None = None
) -> dict[str, Any]:
    """What the tasks measure; perplexity for the validation and the test split, recall across segments on the latter.

    The text is encoded with the model's own tokenizer. folder is a run folder or a model folder. With cache_precisions,
    perplexity is measured through a cache of each, and "cache_precision" of the result holds a row for each.

    Raises:
        UserError: an unknown precision, precisions without the perplexity task, or held-out text to be measured on that
            the model was trained on.
    """
    if cache_precisions and "perplexity" not in tasks:
        raise UserError("--cache-precision belongs to the perplexity task: leave out --tasks, or add perplexity to it")
    from newllm.data import prepare
    from newllm.evaluation.bands import ppl_band
    from newllm.evaluation.cache_precision import compare_precisions
    from newllm.evaluation.perplexity import evaluate as evaluate_perplexity
    from newllm.evaluation.selective import selective_figures
    from newllm.models.cache import check_precision
    from newllm.training.start import check_split

    for precision in cache_precisions or []:
        check_precision(precision)
    settings = resolve(settings)
    check_split(folder, settings)
    settings.model, settings.tokenizer = str(folder), str(model_folder(folder))
    settings.plugin = plugin_of(folder, settings.plugin)
    results: dict[str, Any] = {"model": str(folder)}
    if {"perplexity", "recall", "reversal", "recurrence"} & set(tasks):
        model, _ = open_model(settings)
        data = prepare(settings, print)
    if "recall" in tasks:  # what cannot be measured is told before anything is
        from newllm.data.recall import RecallTask

        RecallTask(data, settings).check_evaluation(settings.recall_distances)
    if "reversal" in tasks:
        from newllm.data.reversal import ReversalTask

        ReversalTask(data)
    if "perplexity" in tasks:
        splits = {split: data.splits[split] for split in SPLITS}
        if cache_precisions:
            results["cache_precision"] = compare_precisions(model, splits, settings, cache_precisions)
        else:
            results |= {split: evaluate_perplexity(model, tokens, settings) for split, tokens in splits.items()}
            for split, tokens in splits.items():
                results[split]["band"] = ppl_band(results[split]["ppl"], tokens.num_bytes / len(tokens.ids))
                if figures := selective_figures(model, tokens, settings):
                    results[split]["selective"] = figures
    if "recall" in tasks:
        from newllm.evaluation.recall import evaluate_recall

        results["recall_across_segments"] = evaluate_recall(model, data, settings)
    if "reversal" in tasks:
        from newllm.evaluation.reversal import evaluate_reversal

        results["reversal"] = evaluate_reversal(model, data, settings)
    if "recurrence" in tasks:
        from newllm.evaluation.recurrence import recurrence_figures

        results["recurrence"] = recurrence_figures(model, data.splits["test"], settings)
    if "efficiency" in tasks:
        from newllm.evaluation.efficiency import measure_all

        results["efficiency"] = measure_all([folder], settings)[0]
    return results


def print_results(results: dict[str, Any]) -> None:
    """A table for people, then one JSON line for programs."""
    for split in SPLITS:
        if "cache_precision" in results:
            print_precisions(split, results["cache_precision"])
        if split not in results:
            continue
        result = results[split]
        print(f"\n{split}: {result['tokens']:,} tokens")
        positions = ", ".join(f"{p['from']}–{p['to']}: {_ppl(p['ppl'])}" for p in result["ppl_by_position"])
        recall = result["recall"]
        lines = {
            "perplexity": f"{result['ppl']:.3f} ({result['loss']:.4f} nats a token): {result['band']['band']}",
            "bits per byte": f"{result['bits_per_byte']:.4f}",
            "by position": positions,
            "sliding window": f"{result['sliding_ppl']:.3f} (window {result['sliding']['window']}, "
            f"stride {result['sliding']['stride']})",
            "without context": f"{result['segment_ppl']:.3f} (segments scored alone: a warning, not a result)",
            "repeated bigrams": f"{_ppl(recall['repeated'])} on {recall['repeated_share']:.1%} of the tokens, "
            f"{_ppl(recall['other'])} on the rest",
        }
        if selective := result.get("selective"):
            lines["weighted by gates"] = (
                f"{selective['weighted_ppl']:.3f}, with {selective['weight']:.1%} of the tokens' weight: no result to "
                "compare"
            )
        for label, text in lines.items():
            print(f"  {label:17} {text}")
    if "recall_across_segments" in results:
        print_recall(results["recall_across_segments"])
    if "reversal" in results:
        print_reversal(results["reversal"])
    if "recurrence" in results:
        print_recurrence(results["recurrence"])
    for key, value in results.get("efficiency", {}).items():
        print(f"  {key:40} {value}")
    print(json.dumps(finite(results), allow_nan=False))


def print_precisions(split: str, rows: list[dict[str, Any]]) -> None:
    """A row for each precision of the cache; differences are to the first."""
    print(f"\n{split}: {rows[0][split]['tokens']:,} tokens, read through caches of")
    print(f"  {'':17} {'perplexity':>12} {'difference':>12} {'sliding':>12} {'bytes a token':>14} {'state bytes':>12}")
    for row in rows:
        result = row[split]
        name = row["dtype"] if row["cache_precision"] == "model" else row["cache_precision"]
        difference = f"{math.expm1(result['delta_loss']):+.2%}"
        print(
            f"  {name:17} {result['ppl']:12.3f} {difference:>12} {result['sliding_ppl']:12.3f} "
            f"{row['cache_bytes_per_token']:14,.0f} {row['state_bytes']:12,.0f}"
        )


def print_recall(recall: dict[str, Any]) -> None:
    """A row for each distance; with the knock-outs where the model has memories."""
    print(
        f"\nrecall: {recall['facts']} facts in a window, {recall['distances'][0]['windows']} windows a distance, "
        f"chance {recall['chance']:.1%}; [95 % interval]"
    )
    titles = ("accuracy", "among told", "zeroed", "swapped", "state bytes")
    print(f"  segments later {titles[0]:>24}" + "".join(f"{title:>13}" for title in titles[1:]))
    for row in recall["distances"]:
        accuracy = row["accuracy"]
        interval = f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]"
        knocked_out = [f"{row[name]['accuracy']['value']:.1%}" if name in row else "—" for name in titles[2:4]]
        cells = [f"{row['accuracy_among_told']['value']:.1%}", *knocked_out, f"{row['state_bytes']:,.0f}"]
        print(f"  {row['distance']:14} {interval:>24}" + "".join(f"{cell:>13}" for cell in cells))
    if not recall["knock_outs"]:
        print(
            f"  not zeroed, not swapped: no layer here writes a memory at the end of every {recall['segment']} tokens"
        )


def print_reversal(reversal: dict[str, Any]) -> None:
    """A row for each group and direction."""
    print(f"\nreversal: {reversal['pairs']} pairs of {len(reversal['kinds'])} kinds; [95 % interval over the pairs]")
    print(
        f"  {'told':9}{'asked':9}{'pairs':>6}{'exact':>9}{'first':>9}{'chance':>9}{'AUC':>24}{'p':>9}{'answer PPL':>12}"
    )
    for name, group in reversal["groups"].items():
        for direction in ("forward", "backward"):
            row = group[direction]
            auc = f"{row['auc']['value']:.3f} [{row['auc']['low']:.3f}, {row['auc']['high']:.3f}]"
            shares = [row["exact"]["value"], row["first"]["value"], row["chance"]]
            cells = "".join(f"{share:>9.1%}" for share in shares)
            print(f"  {name:9}{direction:9}{group['pairs']:6}{cells}{auc:>24}{row['p']:9.2g}{row['answer_ppl']:12,.2f}")
    print(
        f"  sentences told forward: perplexity {reversal['forward_ppl']:,.2f} forward, {reversal['backward_ppl']:,.2f} "
        f"backward (ratio {reversal['ratio']:.3g}, gap {reversal['gap']:+,.2f})"
    )
    if not reversal["told"]:
        print(f"  fewer than {reversal['needed']:.0%} are answered forward: the backward figures say nothing")


def print_recurrence(recurrence: dict[str, Any] | None) -> None:
    """A row for each number of parallel passes, then true recurrence."""
    if recurrence is None:
        print("\nrecurrence: this model feeds no state back")
        return
    print("\nrecurrence: on the test split, from the states of a discrete pass")
    for row in recurrence["passes"]:
        passes = f"{row['passes']} pass{'es' if row['passes'] > 1 else ''}"
        print(f"  {passes:17} {row['ppl']:12.3f}   residual {row['residual']:.4f}")
    print(f"  {'true recurrence':17} {recurrence['ppl']:12.3f}")


def _ppl(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
