# ruff: noqa: E501
"""Makes a results.json with the shape of a real one: five models on three seeds, one more on one seed, one failed run.

`python tests/experiments/results_fixture.py FOLDER [--models N] [--seeds N]` writes it together with its report.
"""

import argparse
import math
import random
from pathlib import Path

MODELS = {  # perplexity relative to the baseline, cache bytes per token, relative decoding time, how much it gains from position
    "pythia": (1.0, 4096, 1.0, 0.0),
    "pythia_alibi": (0.985, 4096, 1.03, 0.02),
    "pythia_nope": (1.062, 4096, 0.97, -0.02),
    "gqa": (1.004, 2048, 0.86, 0.0),
    "mqa": (1.031, 1024, 0.78, 0.0),
    "gqa:num_kv_heads=2,window=128": (1.024, 2048, 0.7, -0.03),
}
SAMPLE = (
    "KING HENRY:\nWhat says the Duke? My lord, the night is come,\nAnd all the soldiers of the king are gone\n"
    "To see the city. <b>Let us to the field</b> & stand.\n\nWARWICK:\nMy gracious liege, I have a thousand men."
)
POSITIONS = [(0, 16), (16, 32), (32, 64), (64, 96), (96, 128), (128, 256)]


def make_row(model: str, seed: int, quality: float, cache: int, speed: float, slope: float) -> dict:
    rng = random.Random(f"{model}-{seed}")
    shared = random.Random(seed).gauss(0, 0.008)
    loss = math.log(78.0) + math.log(quality) + shared + rng.gauss(0, 0.003)
    curve = []
    for step in range(0, 1501, 10):
        falling = loss + 4.2 * math.exp(-step / 140) + 0.6 * math.exp(-step / 700)
        curve.append({"step": step, "tokens": step * 2048, "train_loss": falling - 0.12 + rng.gauss(0, 0.06)})
        if step and step % 150 == 0:
            curve.append({"step": step, "tokens": step * 2048, "val_loss": falling + rng.gauss(0, 0.004)})
    ppl = math.exp(loss)
    return {
        "model": model, "seed": seed, "layers": f"4 × {model.split(':')[0].split('_')[0]}", "parameters": 5_257_216 - 40 * (4096 - cache),
        "tokens": 3_072_000, "steps": 1500, "seconds": 341.2 * speed, "stopped_early": False,
        "val_loss": loss, "val_ppl": ppl, "bits_per_byte": loss / math.log(2) / 3.41,
        "test_loss": loss + 0.04, "test_ppl": ppl * 1.041, "test_bits_per_byte": (loss + 0.04) / math.log(2) / 3.39,
        "ppl_by_position": [
            {"from": a, "to": b, "ppl": ppl * (0.93 + 2.2 / (1 + a / 6)) * (1 - slope * math.log2(1 + a / 16)), "tokens": 4000}
            for a, b in POSITIONS
        ],
        "sliding_ppl": ppl * 0.94, "segment_ppl": ppl * 2.4,
        "recall": {"repeated": ppl * 0.22, "other": ppl * 1.6, "repeated_share": 0.31},
        "cache_bytes_per_token": cache, "cache_bytes_allocated_per_token": cache * 1.125, "state_bytes": 0,
        "train_tokens_per_second": 9400 / speed**0.2 + rng.gauss(0, 90), "prefill_ms": 61 * speed + rng.gauss(0, 1),
        "prefill_tokens": 1024, "decode_ms_per_token": 2.4 * speed + rng.gauss(0, 0.03), "decode_context": 2048,
        "peak_memory_bytes": int(640e6 * speed**0.1),
        "checks": [
            {"name": name, "passed": True, "detail": detail}
            for name, detail in [
                ("future", "changing a token changes no earlier logit"),
                ("rows", "no row sees another"),
                ("chunks", "largest difference 2.4e-06"),
                ("finite", "all logits are finite"),
            ]
        ],
        "valid": True,
        "ppl_band": {"band": "normal", "advice": "Nothing unusual for a vocabulary of this size."},
        "curve": curve, "sample": SAMPLE, "hash": "0123456789abcdef",
    }  # fmt: skip


RECALL = {  # accuracy at 1, 4 and 16 segments, bytes of state at 16, whether it has memories to take away
    "pythia": ((0.99, 0.985, 0.96), 2_097_152, False),
    "pythia_alibi": ((0.97, 0.93, 0.41), 2_097_152, False),
    "gqa": ((0.98, 0.96, 0.93), 1_048_576, True),
    "mqa": ((0.94, 0.81, 0.33), 131_072, True),
}


def make_recall(model: str, seed: int) -> dict | None:
    """As evaluate_recall gives it: chance is 1 of 64, and with knock-outs recall falls to it."""
    if model not in RECALL:
        return None
    rng = random.Random(f"recall-{model}-{seed}")
    accuracies, state_bytes, memories = RECALL[model]

    def share(value: float) -> dict:
        value = min(1.0, max(0.0, value + rng.gauss(0, 0.012)))
        return {"value": value, "low": max(0.0, value - 0.04), "high": min(1.0, value + 0.04)}

    def both(value: float) -> dict:
        return {"accuracy": share(value), "accuracy_among_told": share(0.5 + value / 2)}

    distances = []
    for distance, accuracy in zip((1, 4, 16), accuracies, strict=True):
        record = {
            "distance": distance,
            "tokens": (distance + 1) * 32,
            "beyond_training": distance == 16,
            "windows": 200,
        }
        record |= {**both(accuracy), "answer_ppl": 1.4, "cached_accuracy": accuracy, "state_bytes": state_bytes}
        distances.append(record | ({"zeroed": both(0.015), "swapped": both(0.02)} if memories else {}))
    example = [
        ["text", "And all the soldiers"],
        ["fact", " Know: they call Hamlet <ring>."],
        ["text", " of the king"],
        ["other fact", " Hear: we name Kate moon."],
        ["text", " are gone\nTo see the city."],
        ["question", " Say: they call Hamlet"],
        ["answer", " <ring>"],
        ["question", "."],
        ["text", " Stand & go."],
    ]
    return {
        "segment": 32, "facts": 2, "names": 60, "answers": 64, "chance": 1 / 64, "chance_among_told": 0.5,
        "distances": distances, "example": example,
    }  # fmt: skip


def make_results(seeds: int = 3, models: int | None = None, recall: bool = False) -> dict:
    """`seeds` for every model but the last, which has one; `models` None takes the six named ones."""
    chosen = dict(MODELS)
    rng = random.Random(4)
    while models is not None and len(chosen) < models:
        name = f"mixer_{len(chosen)}"
        chosen[name] = (
            rng.uniform(0.95, 1.1),
            rng.choice([512, 1024, 1536, 2048, 4096]),
            rng.uniform(0.7, 1.3),
            rng.uniform(-0.02, 0.02),
        )
    names = list(chosen)[: models or len(chosen)]
    rows = [
        make_row(model, seed, *chosen[model])
        for seed in range(seeds)
        for model in names
        if seed == 0 or model != names[-1] or len(names) == 1
    ]
    if recall:
        for row in rows:
            row["recall_across_segments"] = make_recall(row["model"], row["seed"])
    return {
        "name": "positions and heads", "baseline": "pythia", "created": "2026-11-24T06:30:00+00:00", "version": "0.1.0",
        "command": "newllm compare --models " + " ".join(names) + " --scale small --seeds " + " ".join(map(str, range(seeds))),
        "settings": {
            "data": "shakespeare", "scale": "small", "models": names, "seeds": list(range(seeds)), "hidden_size": 256,
            "num_layers": 4, "num_heads": 4, "intermediate_size": 1024, "vocab_size": 4096, "seq_length": 256, "epochs": 2,
            "samples": None, "max_tokens": None, "batch_size": 8, "gradient_accumulation": 1, "lr": 0.001, "decode_context": 2048,
            "sliding_window": 512, "sliding_stride": 256,
        },
        "machine": {"cpu": "Intel Xeon Platinum 8481C", "cores": 2, "threads": 2, "memory_bytes": 8 * 2**30, "native_bf16": True, "system": "Linux x86_64", "python": "3.11.9", "torch": "2.13.0"},
        "data": {
            "corpus": "Shakespeare's complete works", "split": "by whole works", "tokenizer": "byte-level BPE of 4,096 words, trained on the training split",
            "vocab_size": 4096, "overlap": {"ngram_words": 13, "validation": 0.0004, "test": 0.0011},
            "splits": {
                "train": {"documents": 34, "bytes": 4_712_331, "tokens": 1_536_000, "bytes_per_token": 3.07},
                "validation": {"documents": 2, "bytes": 231_004, "tokens": 76_120, "bytes_per_token": 3.03},
                "test": {"documents": 2, "bytes": 240_118, "tokens": 78_900, "bytes_per_token": 3.04},
            },
        },
        "rows": rows,
        "failed": [{"model": "mixer_from_plugin", "seed": 1, "error": "RuntimeError: shapes <4, 8> and <8, 5> do not fit & stop"}],
    }  # fmt: skip


if __name__ == "__main__":
    from newllm.experiments.report import write_report
    from newllm.experiments.results import write_results

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recall", action="store_true")
    options = parser.parse_args()
    write_results(options.folder, make_results(options.seeds, options.models, options.recall))
    print(write_report(options.folder))
