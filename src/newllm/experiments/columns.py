"""The figures a comparison reports: where each stands in a row, its unit, which direction is better, what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A figure of the report. `key` names it in a row (a dot goes into a record); `scale` turns it into `unit`."""

    key: str
    label: str
    unit: str
    better: str  # "lower", "higher", or "" where neither is better
    explanation: str
    digits: int = 4  # significant digits of a typical value
    scale: float = 1.0
    once: bool = False  # measured once for each model: the rows of all its seeds repeat the figure

    def get(self, row: dict[str, Any]) -> float | None:
        value: Any = row
        for part in self.key.split("."):
            value = (value or {}).get(part)
        return None if value is None else value * self.scale

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


LEAD = Column(
    "test_ppl",
    "Test PPL",
    "",
    "lower",
    "Perplexity on the test split, whose documents were used neither for training nor to choose a checkpoint. A model "
    "with perplexity 60 is as unsure of the next token as if it chose among 60 equally likely ones. Comparable only "
    "between models with the same tokenizer.",
)
MAIN_COLUMNS = [
    LEAD,
    Column(
        "test_bits_per_byte",
        "Bits per byte",
        "",
        "lower",
        "Loss on the test split in bits for each byte of UTF-8 text. Unlike perplexity it does not depend on the "
        "tokenizer, so it may be compared with other projects on the same text.",
    ),
    Column(
        "parameters",
        "Parameters",
        "million",
        "",
        "All weights, embeddings included, also frozen ones and those that only another mode of the model uses. Models "
        "with fewer start at a disadvantage.",
        3,
        1e-6,
    ),
    Column(
        "cache_bytes_per_token",
        "Cache per token",
        "bytes",
        "lower",
        "Memory the model keeps for each token of the context while it generates, in all layers together. Measured "
        "from live tensors, not from a formula.",
        once=True,
    ),
    Column(
        "train_tokens_per_second",
        "Training",
        "tokens/s",
        "higher",
        "Training speed: forward, backward and optimizer step, measured in turn in a process of its own on this "
        "machine.",
        3,
        once=True,
    ),
    Column(
        "decode_ms_per_token",
        "Decoding",
        "ms/token",
        "lower",
        "Time to generate one token for one sequence, with a cache already filled to the context length given in the "
        "settings (decode_context).",
        3,
        once=True,
    ),
    Column(
        "peak_memory_bytes",
        "Peak memory",
        "MiB",
        "lower",
        "Largest memory of the process that measured training speed.",
        3,
        2**-20,
        once=True,
    ),
]
PERPLEXITY_COLUMNS = [
    Column("val_ppl", "Validation PPL", "", "lower", "Perplexity on the split that chose the checkpoint."),
    LEAD,
    Column(
        "sliding_ppl",
        "Sliding-window PPL",
        "",
        "lower",
        "Test perplexity over whole documents: the window slides on, and every token is scored once with a long "
        "context before it.",
    ),
    Column(
        "segment_ppl",
        "No-context PPL",
        "",
        "lower",
        "Test perplexity in pieces scored without what came before. A warning, not a result: it mostly measures how "
        "often the context is missing.",
    ),
    Column(
        "recall.repeated",
        "Repeated tokens",
        "",
        "lower",
        "Perplexity on tokens that complete a pair of tokens already seen in this context. A model that remembers "
        "predicts them far better than the rest.",
    ),
    Column(
        "recall.other",
        "Other tokens",
        "",
        "lower",
        "Perplexity on the tokens that do not repeat a pair already seen in this context.",
    ),
]
COST_COLUMNS = [
    Column("tokens", "Trained on", "tokens", "", "Tokens seen in training, repeats included: the budget really used."),
    Column(
        "seconds",
        "Training time",
        "s",
        "",
        "Wall time of training on these tokens, without a first phase or distillation; the machine may have done other "
        "things.",
        3,
    ),
    Column(
        "cache_bytes_per_token",
        "Cache used",
        "bytes/token",
        "lower",
        "Bytes of the cache that hold data, for each token of the context.",
        once=True,
    ),
    Column(
        "cache_bytes_allocated_per_token",
        "Cache allocated",
        "bytes/token",
        "lower",
        "Bytes the cache reserves, for each token: buffers grow in steps, so this is a little more than what is used.",
        once=True,
    ),
    Column(
        "state_bytes",
        "Fixed state",
        "bytes",
        "lower",
        "Memory that does not grow with the context, such as a recurrent state or a compressive memory.",
        once=True,
    ),
    Column("prefill_ms", "Prefill", "ms", "lower", "Time to read the prompt once and fill the cache.", 3, once=True),
]
ALL_COLUMNS = {column.key: column for column in [*MAIN_COLUMNS, *PERPLEXITY_COLUMNS, *COST_COLUMNS]}
# The same for every seed by construction: no interval, and the difference is exact.
EXACT = {"parameters", "cache_bytes_per_token", "cache_bytes_allocated_per_token", "state_bytes", "tokens"}
