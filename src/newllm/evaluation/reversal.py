"""The reversal curse (SYSTEMS §14): does a model that was told "A is B" know who is B?

Every pair is asked in both directions, after an EOS and with nothing else to read, in words that its kind was told in.
Two figures need the model to produce the answer:

- `exact`: the likeliest token at every place is the answer's, up to the full stop;
- `first`: the answer's log p is the highest among all of a pool.

A model may know a little and still say something else. What tells that is the AUC: the probability that the right
answer has a higher log p than a wrong one, 0.5 where the question says nothing about it. The wrong ones are the answers
of the same kind and group: of another group they would be names the model was told more or less often, or in
other places, and preferring those is no recall. An answer that is likely after every question wins and loses as often,
so that likeliness alone gives 0.5 exactly, on average over the pairs.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from newllm.data.reversal import DIRECTIONS, GROUPS, Kind, Pair, ReversalTask, Sentence
from newllm.evaluation.recall import Z, wilson
from newllm.models.cache import LMCache
from newllm.ops.loss import IGNORED, linear_cross_entropy
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import PreparedData
    from newllm.models import TransformerLM

NEEDED = 0.95
"""Share of the pairs told forward only that must be answered forward, before the backward figures mean anything."""
PERMUTATIONS = 9999


def evaluate_reversal(model: TransformerLM, data: PreparedData, settings: CommonSettings) -> dict[str, Any]:
    """What the model knows of the facts of `data.reversal`, asked in both directions; settings must be resolved. JSON.

    "groups" holds for 'forward' (told forward only), 'both' and 'never', under "forward" and "backward", what
    `_figures` gives. "told": whether the first group is answered forward well enough. Of that group: "forward_ppl" and
    "backward_ppl" of its whole sentences, their "ratio" forward / backward and their "gap" backward − forward, which
    say more about fluency than about recall; and "by_kind" the two figures that matter most.

    Raises:
        UserError: the text holds the facts itself.
    """
    from newllm.training.devices import autocast, resolve_precision

    task = ReversalTask(data)
    asked = {direction: questions(task, direction) for direction in DIRECTIONS}
    was_training = model.training
    model.eval()
    with torch.no_grad(), model.without_memory(), autocast(model.device, resolve_precision(settings, model.device)):
        answers = {direction: _ask(model, task, asked[direction], settings) for direction in DIRECTIONS}
    model.train(was_training)
    groups = {
        group: {d: _figures(answers[d], _blocks(asked[d], group)) for d in DIRECTIONS} | {"pairs": _count(asked, group)}
        for group in GROUPS
    }
    ppl = {d: answers[d].sentence_ppl(np.concatenate(_blocks(asked[d], "forward"))) for d in DIRECTIONS}
    return {
        "pairs": len(asked["forward"]),
        "kinds": [kind.name for kind in task.kinds],
        "left_out": sorted(f"{pair.a} – {pair.b}" for pair in task.left_out),
        "groups": groups,
        "told": groups["forward"]["forward"]["exact"]["value"] >= NEEDED,
        "needed": NEEDED,
        **{f"{direction}_ppl": value for direction, value in ppl.items()},
        "ratio": ppl["forward"] / ppl["backward"],
        "gap": ppl["backward"] - ppl["forward"],
        "by_kind": _by_kind(task, asked, answers),
        "example": _example(task),
    }


@dataclass(frozen=True)
class Question:
    """A pair asked in one direction."""

    kind: Kind
    pair: Pair
    sentence: Sentence


def questions(task: ReversalTask, direction: str) -> list[Question]:
    """Every pair, kind by kind, each in one of its kind's wordings in turn."""
    return [
        Question(kind, pair, task.sentence(kind, pair, direction, number % len(kind.templates[direction])))
        for kind in task.kinds
        for number, pair in enumerate(kind.pairs)
    ]


def _blocks(asked: list[Question], group: str) -> list[np.ndarray]:
    """The places of a group's questions, one array for each kind."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(asked):
        if question.pair.group == group:
            places[question.kind.name].append(place)
    return [np.array(block) for block in places.values()]


def _count(asked: dict[str, list[Question]], group: str) -> int:
    return sum(question.pair.group == group for question in asked["forward"])


@dataclass(frozen=True)
class Answers:
    """What a model makes of the Q questions of one direction."""

    scores: np.ndarray  # (Q, Q) float64: log p of the answer to question j after question i
    kinds: np.ndarray  # (Q,) the kind of each question
    exact: np.ndarray  # (Q,) bool: whether greedy decoding gives the answer
    sentence_nats: np.ndarray  # (Q,) float64, of the question with its answer
    answer_nats: np.ndarray  # (Q,) float64, of the answer alone
    sentence_tokens: np.ndarray  # (Q,)
    answer_tokens: np.ndarray  # (Q,)

    def sentence_ppl(self, places: np.ndarray) -> float:
        return math.exp(self.sentence_nats[places].sum() / self.sentence_tokens[places].sum())

    def answer_ppl(self, places: np.ndarray) -> float:
        return math.exp(self.answer_nats[places].sum() / self.answer_tokens[places].sum())


def _ask(model: TransformerLM, task: ReversalTask, asked: list[Question], settings: CommonSettings) -> Answers:
    sentences = [question.sentence for question in asked]
    nats, exact = _read_whole(model, sentences, task.eos, settings.eval_batch_size)
    prompts = [[task.eos, *sentence.prompt] for sentence in sentences]
    most_tokens = settings.eval_batch_size * settings.seq_length  # type: ignore[operator]
    scores = answer_scores(model, prompts, [sentence.answer for sentence in sentences], most_tokens)
    return Answers(
        scores=scores.double().cpu().numpy(),
        kinds=np.array([question.kind.name for question in asked]),
        exact=np.array(exact),
        sentence_nats=np.array([sum(each) for each in nats]),
        answer_nats=np.array([sum(each[len(s.prompt) :]) for each, s in zip(nats, sentences, strict=True)]),
        sentence_tokens=np.array([len(sentence.ids) for sentence in sentences]),
        answer_tokens=np.array([len(sentence.answer) for sentence in sentences]),
    )


def _read_whole(
    model: TransformerLM, sentences: list[Sentence], eos: int, batch_size: int
) -> tuple[list[list[float]], list[bool]]:
    """Each sentence read at once, as in training: the nats of its tokens, and whether its answer is greedy decoding's."""
    nats, exact = [], []
    for batch in itertools.batched(sentences, batch_size) if hasattr(itertools, "batched") else []:
        pass
    return nats, exact
