"""One trained run as a row of results.json: what it is, how good, whether it keeps the contract, what it writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from newllm.devices import resolve_device
from newllm.evaluation.bands import ppl_band
from newllm.evaluation.checks import check_as_trained, check_model, is_causal
from newllm.evaluation.contexts import context_figures
from newllm.evaluation.memories import memory_figures
from newllm.evaluation.perplexity import evaluate, perplexity
from newllm.evaluation.reading import as_measured
from newllm.evaluation.recall import evaluate_recall
from newllm.evaluation.recurrence import recurrence_figures
from newllm.evaluation.reversal import evaluate_reversal
from newllm.evaluation.selective import selective_figures
from newllm.models import TransformerLM, load_model
from newllm.models.layers.base import create_layer
from newllm.settings import RunSettings
from newllm.training import TrainResult
from newllm.training.checkpoints import read_result

if TYPE_CHECKING:
    from newllm.data import PreparedData

# The sample is an illustration, not a measurement: a few lines to look at.
SAMPLE_PROMPT, SAMPLE_TOKENS = 16, 96


def make_row(settings: RunSettings, data: PreparedData, folder: Path, training: TrainResult) -> dict[str, Any]:
    """Evaluates the model of a run folder. The speed and memory figures are added later, measured side by side.

    The validation loss is that of the kept checkpoint, as training measured it. All other perplexities are of the test
    split, which chose nothing.
    """
    model = load_model(folder).to(resolve_device(settings.device)).eval()  # type: ignore[arg-type]
    validation, test = data.splits["validation"], data.splits["test"]
    result = evaluate(model, test, settings)
    trained_tokens = training.tokens * training.best_step / training.steps  # the kept checkpoint has read no more
    phases = read_result(folder)
    start = phases.get("start")
    before = [{"step": 0, "tokens": 0, "val_loss": start["val_loss"]}] if start else []
    longest = max(settings.seq_length, settings.position_window, settings.sliding_window)  # type: ignore[type-var]
    checks = check_model(model) + check_as_trained(model, longest, settings.precision)  # type: ignore[arg-type]
    valid = is_causal(checks)
    return {
        "model": settings.model,
        "seed": settings.seed,
        "layers": describe_layers(model),
        "parameters": model.num_parameters(),
        "tokens": training.tokens,
        "steps": training.steps,
        "seconds": training.seconds,
        "stopped_early": training.stopped_early,
        "best_step": training.best_step,
        "reconstruction": phases.get("reconstruction"),
        "projection": phases.get("projection"),
        "start": start_figures(start) if start else None,
        "val_loss": training.best_val_loss,
        "val_ppl": perplexity(training.best_val_loss),
        "bits_per_byte": training.best_val_loss / math.log(2) * len(validation.ids) / validation.num_bytes,
        "test_loss": result["loss"],
        "test_ppl": result["ppl"],
        "test_bits_per_byte": result["bits_per_byte"],
        "test_tokens": result["tokens"],
        **{key: result[key] for key in ("ppl_by_position", "sliding_ppl", "sliding", "segment_ppl", "recall")},
        **({"recall_across_segments": evaluate_recall(model, data, settings)} if settings.recall_share else {}),
        **({"reversal": evaluate_reversal(model, data, settings, trained_tokens)} if settings.reversal_share else {}),
        "memories": memory_figures(model, test, settings),
        "contexts": context_figures(model, test, settings),
        "recurrence": recurrence_figures(model, test, settings),
        "selective": selective_figures(model, test, settings),
        "checks": [dataclasses.asdict(check) for check in checks],
        "valid": valid,
        "ppl_band": ppl_band(
            result["ppl"], test.num_bytes / len(test.ids), causal=valid, overlap=data.info["overlap"]["test"]
        ),
        "curve": before + [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "sample": sample(model, data, settings),
        "hash": settings.hash(),
    }


def start_figures(start: dict[str, Any]) -> dict[str, Any]:
    """What training from a trained model has begun with, with perplexities beside the losses."""
    losses = {key: start[key] for key in ("val_loss", "undistilled_val_loss")}
    ppl = {key.replace("loss", "ppl"): None if loss is None else perplexity(loss) for key, loss in losses.items()}
    return start | ppl


def describe_layers(model: TransformerLM) -> str:
    """'4 × pythia (num_kv_heads=2)': the layer types in order, with the options that are not the type's defaults."""
    groups = [(spec, len(list(group))) for spec, group in itertools.groupby(model.config.layer_specs)]
    return " + ".join(f"{count} × {describe_layer(spec)}" for spec, count in groups)


def describe_layer(spec: dict[str, Any]) -> str:
    shape = {key: spec[key] for key in ("type", "hidden_size", "num_heads", "intermediate_size")}
    with torch.device("meta"):
        defaults = create_layer(shape).spec
    options = [f"{key}={short(value)}" for key, value in spec.items() if value != defaults.get(key)]
    return f"{spec['type']} ({', '.join(options)})" if options else spec["type"]


def short(value: Any) -> str:
    """An option's value; {'type': 'alibi', 'slope': 0.0625} as 'alibi 0.0625'."""
    if not isinstance(value, dict):
        return str(value)
    ignored = "slope" if value.get("slopes") == "geometric" else None  # it is that of the uniform scheme
    return " ".join(short(item) for name, item in value.items() if name != ignored)


def sample(model: TransformerLM, data: PreparedData, settings: RunSettings) -> str:
    """The beginning of the test split, and how the model goes on."""
    prompt = torch.from_numpy(data.splits["test"].ids[None, :SAMPLE_PROMPT].astype("int64")).to(model.device)
    transformers.set_seed(settings.seed)
    with as_measured(model, settings.precision):
        ids = model.generate(  # type: ignore[misc]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=SAMPLE_TOKENS, do_sample=True, top_k=50
        )
    return str(data.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True))
