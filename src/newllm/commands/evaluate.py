"""`newllm evaluate`: measures a trained model again, on its own text or on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from newllm.commands.flags import check_config
from newllm.commands.folders import model_folder, open_model, run_config
from newllm.settings import RunSettings, UserError, nearest, resolve

TASKS = ["perplexity", "efficiency"]


def settings_of(folder: Path, tasks: list[str]) -> RunSettings:
    """The settings a model was trained with; the defaults for a model folder without config.yaml.

    Raises:
        UserError: no such folder, or an unknown task.
    """
    for task in tasks:
        if task not in TASKS:
            raise nearest(task, TASKS, "task")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a trained model")
    return RunSettings(**check_config(run_config(folder), RunSettings, f"{folder / 'config.yaml'}: "))


def evaluate(folder: Path, tasks: list[str], settings: RunSettings) -> dict[str, Any]:
    """What the tasks measure; perplexity for the validation and the test split.

    The text is encoded with the model's own tokenizer. folder is a run folder or a model folder.
    """
    from newllm.data import prepare
    from newllm.evaluation.bands import ppl_band
    from newllm.evaluation.perplexity import evaluate as evaluate_perplexity

    settings = resolve(settings)
    settings.model, settings.tokenizer = str(folder), str(model_folder(folder))
    results: dict[str, Any] = {"model": str(folder)}
    if "perplexity" in tasks:
        model, _ = open_model(settings)
        data = prepare(settings, print)
        for split in ("validation", "test"):
            tokens = data.splits[split]
            result = evaluate_perplexity(model, tokens, settings)
            result["band"] = ppl_band(result["ppl"], tokens.num_bytes / len(tokens.ids))
            results[split] = result
    if "efficiency" in tasks:
        from newllm.evaluation.efficiency import measure_all

        results["efficiency"] = measure_all([folder], settings)[0]
    return results


def print_results(results: dict[str, Any]) -> None:
    """A table for people, then one JSON line for programs."""
    for split in ("validation", "test"):
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
        for label, text in lines.items():
            print(f"  {label:17} {text}")
    for key, value in results.get("efficiency", {}).items():
        print(f"  {key:40} {value}")
    print(json.dumps(results))


def _ppl(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
