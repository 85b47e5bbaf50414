"""Runs small enough for a test: an excerpt of a play, and the settings to train on it in a second."""

import json

from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.resolution import resolve
from newllm.settings import DataSettings, ExperimentSettings, RunSettings
from newllm.training import train

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "vocab_size": 300}
WINDOWS = {"seq_length": 32, "batch_size": 4}
STEP = 4 * 32  # tokens of an optimizer step


def excerpt(folder, characters=60_000):
    """Puts the beginning of a play there, and gives back the folder."""
    document = next(iter(open_corpus(DataSettings()).documents()))
    (folder / "play.txt").write_text(document.text[:characters])
    return folder


def place(text):
    """Where the text is; on one thread, for results that are equal bit for bit."""
    return {"data": str(text / "play.txt"), "cache_dir": str(text / "cache"), "threads": 1}


def tiny(text, **changes):
    """A run of 20 steps on the excerpt in the folder `text`."""
    values = {"lr": 0.003, "evaluations": 2, "max_tokens": 20 * STEP, "precision": "float32"}
    return resolve(RunSettings(**SHAPE | WINDOWS | place(text) | values | changes))


def tiny_comparison(text, out, **changes):
    """A comparison of two models over 6 steps each; not resolved."""
    values = {"models": ["pythia", "mqa"], "out": str(out), "jobs": 1, "evaluations": 2, "max_tokens": 6 * STEP}
    measured = {"eval_tokens": 500, "sliding_window": 64, "sliding_stride": 32, "decode_context": 64}
    return ExperimentSettings(**SHAPE | WINDOWS | place(text) | values | measured | {"efficiency": False} | changes)


def run(settings, folder, on_progress=None):
    return train(settings, prepare(settings), folder, on_progress)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
