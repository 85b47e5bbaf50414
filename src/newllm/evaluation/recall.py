"""Recall across segments (SYSTEMS §15): how often a model answers what a text has told it some segments before.

Every model is asked the same windows of held-out text (`data.recall`), and its answer is the likeliest of the words
that are answers anywhere. Each window is read twice: at once, as in training, and through a cache in two pieces, up to
the question's segment and from there. Between the two the memories of a model that has any can be taken away:

- zeroed: as if nothing had been read;
- swapped: each window gets the memories of another one, whose answer is another.

If recall then falls to chance, it was the memories that answered.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from newllm.data.recall import RecallTask, RecallWindow
from newllm.evaluation.cache_size import cache_bytes
from newllm.evaluation.perplexity import perplexity
from newllm.evaluation.reading import as_measured
from newllm.models.cache import LMCache, MemoryState
from newllm.models.memory import layers_with_memories
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import PreparedData
    from newllm.models import TransformerLM

KNOCK_OUTS = ("zeroed", "swapped")
Z = 1.959964  # of a 95 % interval


def evaluate_recall(model: TransformerLM, data: PreparedData, settings: CommonSettings) -> dict[str, Any]:
    """Recall on the test split at each of recall_distances; settings must be resolved. JSON.

    "distances" holds for each: "accuracy" among all answers and "accuracy_among_told" among those of this window's
    facts, each {"value", "low", "high"} with a 95 % interval; "cached_accuracy", the same as the first if reading in
    pieces changes nothing; "answer_ppl", perplexity of the answer among all tokens; "state_bytes", what one row keeps
    when it comes to the question's segment; and, for models with memories that end their segments where the question's
    begins, "zeroed" and "swapped", each with both accuracies.

    Raises:
        UserError: the text, the tokenizer or the settings make no windows.
    """
    task = RecallTask(data, settings)
    task.check_evaluation(settings.recall_distances)
    with as_measured(model, settings.precision):
        distances = [_at_distance(model, task, distance, settings) for distance in sorted(settings.recall_distances)]
    return {
        "segment": task.segment,
        "facts": task.facts,
        "names": len(task.words.names),
        "answers": len(task.words.answers),
        "knock_outs": has_memories(model, task.segment),
        "chance": 1 / len(task.words.answers),
        "chance_among_told": 1 / task.facts,
        "distances": distances,
        "example": example(task, data, min(settings.recall_distances)),
    }


def _at_distance(model: TransformerLM, task: RecallTask, distance: int, settings: CommonSettings) -> dict[str, Any]:
    length = (distance + 1) * task.segment
    windows = [task.evaluation_window(distance, index) for index in range(settings.recall_windows)]
    most = max(3, settings.eval_batch_size * settings.seq_length // length)  # type: ignore[operator]
    edges = np.linspace(0, len(windows), math.ceil(len(windows) / most) + 1).round().astype(int).tolist()
    answers = torch.from_numpy(task.words.answer_ids).to(model.device)
    knock_outs = KNOCK_OUTS if has_memories(model, task.segment) else ()
    scores: dict[str, list[Tensor]] = {name: [] for name in ("at once", "cached", *knock_outs)}
    nats, state_bytes = [], 0.0
    for begin, end in pairwise(edges):
        batch = windows[begin:end]
        ids = torch.from_numpy(np.stack([window.ids for window in batch])).to(model.device)
        asked = torch.tensor([int(window.answers[0]) - 1 for window in batch], device=model.device)
        logits = _logits(model, model.hidden_states(ids), asked)
        target = ids.gather(1, asked[:, None] + 1)
        nats.append(-logits.log_softmax(dim=-1).gather(1, target))
        scores["at once"].append(logits[:, answers])
        cut = distance * task.segment
        before = model.make_cache()
        model.hidden_states(ids[:, :cut], past_key_values=before)
        state_bytes = cache_bytes(before).used / len(batch)
        for name in ("cached", *knock_outs):
            cache = model.make_cache()
            cache.restore(before.export())
            if name != "cached":
                knock_out(cache, name, batch)
            hidden = model.hidden_states(ids[:, cut:], past_key_values=cache)
            scores[name].append(_logits(model, hidden, asked - cut)[:, answers])
    told = torch.from_numpy(np.stack([window.told for window in windows])).to(model.device)
    found = {name: accuracies(torch.cat(parts), told) for name, parts in scores.items()}
    return {
        "distance": distance,
        "tokens": length,
        "beyond_training": length > settings.seq_length,  # type: ignore[operator]
        "windows": len(windows),
        **found["at once"],
        "answer_ppl": perplexity(float(torch.cat(nats).mean())),
        "cached_accuracy": found["cached"]["accuracy"]["value"],
        "state_bytes": state_bytes,
        **{name: found[name] for name in knock_outs},
    }


def _logits(model: TransformerLM, hidden: Tensor, place: Tensor) -> Tensor:
    """Logits (B, V) float32 at one place (B,) of each row of hidden (B, T, D)."""
    return model.head(hidden[torch.arange(len(hidden), device=hidden.device), place]).float()


def accuracies(scores: Tensor, told: Tensor) -> dict[str, Any]:
    """scores (W, A) of all answers; told (W, F) the answers of each window's facts, the asked one first."""
    among_told = scores.gather(1, told)
    asked = among_told[:, :1]
    return {
        "accuracy": wilson(_answered(scores, asked), len(scores)),
        "accuracy_among_told": wilson(_answered(among_told, asked), len(scores)),
    }


def _answered(scores: Tensor, asked: Tensor) -> float:
    """Windows in which the asked answer (W, 1) has the highest of the scores (W, n).

    In bf16 two answers may well have the same: of so many that are highest, one in as many is taken for the right one.
    """
    highest = scores.amax(dim=1, keepdim=True)
    return float(((asked == highest).double() / (scores == highest).sum(dim=1, keepdim=True)).sum())


def wilson(successes: float, trials: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson, 1927), which is one at 0 and at 1 too."""
    share = successes / trials
    centre = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2)) / (1 + Z**2 / trials)
    return {"value": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def has_memories(model: TransformerLM, segment: int) -> bool:
    """Whether any layer has memories, and every such layer has written all that it read at multiples of `segment`.

    Otherwise the fact may still be pending, and taking the memories away would not take it away.
    """
    layers = layers_with_memories(model.layers)
    return bool(layers) and all(segment % layer.segment_length == 0 for layer in layers.values())


def knock_out(cache: LMCache, name: str, windows: list[RecallWindow]) -> None:
    """Takes away the memories of a cache that has read these windows, one a row: 'zeroed' or 'swapped'."""
    source = another_row(windows)
    for state in cache.parts():
        if isinstance(state, MemoryState):
            memory = state.memory()
            for key, tensor in memory.items():
                memory[key] = torch.zeros_like(tensor) if name == "zeroed" else tensor[source.to(tensor.device)]
            state.set_memory(memory)


def another_row(windows: list[RecallWindow]) -> Tensor:
    """(B,) int64: for each window the next one (the first follows the last) whose asked answer is another."""
    asked = [int(window.told[0]) for window in windows]
    count = len(asked)
    following = [[(row + step) % count for step in range(1, count + 1)] for row in range(count)]
    return torch.tensor(
        [next((r for r in rows if asked[r] != asked[row]), rows[0]) for row, rows in enumerate(following)]
    )


def example(task: RecallTask, data: PreparedData, distance: int) -> list[list[str]]:
    """A window of this distance as [kind, text] pieces: 'text', 'fact', 'other fact', 'question', 'answer'."""
    window = task.evaluation_window(distance, 0)
    cuts: list[tuple[str, int]] = []  # a kind and where it ends
    for kind, start, stop in window.parts:
        cuts.append(("text", start))
        if kind == "question":
            answer = int(window.answers[0])
            cuts += [(kind, answer), ("answer", answer + 1)]
        cuts.append((kind, stop))
    cuts.append(("text", len(window.ids)))
    ids, done = window.ids.tolist(), 0
    pieces: list[list[str]] = []
    for kind, stop in cuts:
        if stop > done:
            pieces.append([kind, str(data.tokenizer.decode(ids[done:stop]))])
        done = stop
    return pieces
