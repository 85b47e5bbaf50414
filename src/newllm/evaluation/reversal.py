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

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from newllm.data.reversal import DIRECTIONS, GROUPS, Kind, Pair, ReversalTask, Sentence
from newllm.evaluation.cache_size import cache_bytes
from newllm.evaluation.perplexity import perplexity
from newllm.evaluation.reading import as_measured
from newllm.evaluation.recall import Z, wilson
from newllm.ops.loss import linear_cross_entropy
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import PreparedData
    from newllm.models import TransformerLM

NEEDED = 0.95
"""Share of the pairs told forward only that must be answered forward, before the backward figures mean anything."""
PERMUTATIONS = 9999
MOST_BYTES = 2**28
"""Of the caches of all answers that are read at a time: the matrices of compressive memories are large."""


def evaluate_reversal(
    model: TransformerLM, data: PreparedData, settings: CommonSettings, trained_tokens: float | None = None
) -> dict[str, Any]:
    """What the model knows of the facts of `data.reversal`, asked in both directions; settings must be resolved. JSON.

    "groups" holds for 'forward' (told forward only), 'both' and 'never', under "forward" and "backward", what
    `group_figures` gives. "told": whether the first group is answered forward well enough. Of that group: "forward_ppl"
    and "backward_ppl" of its whole sentences, their "ratio" forward / backward and their "gap" backward − forward,
    which say more about fluency than about recall; and "by_kind" the two figures that matter most. "readings": how
    often each sentence has been read in training.

    Args:
        trained_tokens: of all training up to these weights; None where it is not known, and "readings" then neither.

    Raises:
        UserError: the text holds the facts itself.
    """
    task = ReversalTask(data)
    asked = {direction: questions(task, direction) for direction in DIRECTIONS}
    with as_measured(model, settings.precision), model.without_memory():
        answers = {direction: _ask(model, task, asked[direction], settings) for direction in DIRECTIONS}
    blocks = {group: blocks_of(asked["forward"], group) for group in GROUPS}  # the same in both directions
    groups: dict[str, Any] = {
        group: {"pairs": sum(map(len, blocks[group]))}
        | {d: group_figures(answers[d], blocks[group]) for d in DIRECTIONS}
        for group in GROUPS
    }
    ppl = {direction: answers[direction].sentence_ppl(np.concatenate(blocks["forward"])) for direction in DIRECTIONS}
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
        "by_kind": _by_kind(answers),
        "readings": None if trained_tokens is None else _readings(task, settings, trained_tokens),
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


def blocks_of(asked: list[Question], group: str) -> list[np.ndarray]:
    """The places of a group's questions, one array for each kind."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(asked):
        if question.pair.group == group:
            places[question.kind.name].append(place)
    return [np.array(block) for block in places.values()]


@dataclass(frozen=True)
class Answers:
    """What a model makes of the Q questions of one direction."""

    asked: list[Question]
    scores: np.ndarray  # (Q, Q) float64: log p of the answer to question j after question i
    nats: list[np.ndarray]  # of every token of each question with its answer
    exact: np.ndarray  # (Q,) bool: whether greedy decoding gives the answer

    def sentence_ppl(self, places: np.ndarray) -> float:
        return perplexity(float(np.concatenate([self.nats[i] for i in places]).mean()))

    def answer_ppl(self, places: np.ndarray) -> float:
        nats = [self.nats[i][len(self.asked[i].sentence.prompt) :] for i in places]
        return perplexity(float(np.concatenate(nats).mean()))


def _ask(model: TransformerLM, task: ReversalTask, asked: list[Question], settings: CommonSettings) -> Answers:
    sentences = [question.sentence for question in asked]
    nats, exact = [], []
    for start in range(0, len(sentences), settings.eval_batch_size):
        for sentence_nats, is_exact in _read_whole(
            model, sentences[start : start + settings.eval_batch_size], task.eos
        ):
            nats.append(sentence_nats)
            exact.append(is_exact)
    prompts = [[task.eos, *sentence.prompt] for sentence in sentences]
    most_tokens = settings.eval_batch_size * settings.seq_length  # type: ignore[operator]
    scores = answer_scores(model, prompts, [sentence.answer for sentence in sentences], most_tokens)
    return Answers(asked, scores.double().cpu().numpy(), nats, np.array(exact))


def _read_whole(model: TransformerLM, sentences: list[Sentence], eos: int) -> list[tuple[np.ndarray, bool]]:
    """Sentences read at once, as in training: the nats of each one's tokens, and whether it is answered exactly."""
    longest = max(len(sentence.ids) for sentence in sentences)
    rows = [
        [eos, *s.ids, *[eos] * (longest - len(s.ids))] for s in sentences
    ]  # what follows a sentence, it does not see
    ids = torch.tensor(rows, device=model.device)  # (B, T)
    logits = model.head(model.hidden_states(ids[:, :-1])).float()  # (B, T − 1, V)
    nats = -logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0].double().cpu().numpy()
    right = (logits.argmax(dim=-1) == ids[:, 1:]).cpu().numpy()
    return [
        (nats[row, : len(s.ids)], bool(right[row, len(s.prompt) : len(s.ids)].all())) for row, s in enumerate(sentences)
    ]


def answer_scores(model: TransformerLM, prompts: list[list[int]], answers: list[list[int]], most_tokens: int) -> Tensor:
    """(P, A) float32: log p of each answer after each prompt, summed over the answer's tokens.

    Prompts of one length are read into a cache, whose rows are then repeated for all answers of one length: nothing is
    padded. As many prompts at a time as keep the answers' tokens within most_tokens and their caches within MOST_BYTES,
    but at least one.
    """
    scores = torch.zeros(len(prompts), len(answers), device=model.device)
    most_rows = MOST_BYTES // _bytes_after(model, max(prompts, key=len))
    for asked in _by_length(answers):
        wanted = torch.tensor([answers[i] for i in asked], device=model.device)  # (A', L)
        at_a_time = max(1, min(most_tokens // wanted.numel(), most_rows // len(asked)))
        for chosen in _by_length(prompts):
            for start in range(0, len(chosen), at_a_time):
                batch = chosen[start : start + at_a_time]
                rows = torch.tensor([prompts[i] for i in batch], device=model.device)
                scores[np.ix_(batch, asked)] = _log_p(model, rows, wanted)
    return scores


def _bytes_after(model: TransformerLM, prompt: list[int]) -> int:
    """Of the cache of one row that has read a prompt."""
    cache = model.make_cache()
    model.hidden_states(torch.tensor([prompt], device=model.device), past_key_values=cache)
    return max(1, cache_bytes(cache).used)


def _log_p(model: TransformerLM, prompts: Tensor, answers: Tensor) -> Tensor:
    """(b, A) float32: log p of each answer (A, L) after each prompt (b, T)."""
    cache = model.make_cache()
    last = model.hidden_states(prompts, past_key_values=cache)[:, -1]
    log_p = model.head(last).float().log_softmax(dim=-1)[:, answers[:, 0]]
    if answers.shape[1] > 1:
        cache.batch_repeat_interleave(len(answers))
        read, wanted = (tokens.repeat(len(prompts), 1) for tokens in (answers[:, :-1], answers[:, 1:]))
        hidden = model.hidden_states(read, past_key_values=cache)
        nats = linear_cross_entropy(hidden.flatten(0, 1), model.head.weight, wanted.flatten(), "none")
        log_p = log_p - nats.float().view(*log_p.shape, -1).sum(dim=2)
    return log_p


def _by_length(rows: list[list[int]]) -> list[list[int]]:
    """The indices of rows, together where they are equally long."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[len(row)].append(index)
    return list(groups.values())


def group_figures(answers: Answers, blocks: list[np.ndarray]) -> dict[str, Any]:
    """Of one group in one direction; `blocks` are its questions by kind.

    "auc" (`mean_auc`) and "first" among the answers of the same kind and group, "p" of the former (`permutation_p`),
    "chance" of the latter; "exact"; all as {"value", "low", "high"} with a 95 % interval over the pairs. Among all
    answers of this direction: "auc_pool", "first_pool", "mean_rank_pool" (1 is best); among those of the same kind, of
    any group: "auc_kind". "answer_ppl" is the perplexity of the answer's tokens.
    """
    places = np.concatenate(blocks)
    kinds = np.array([question.kind.name for question in answers.asked])
    everywhere = np.arange(len(kinds))
    in_block = [shares_below(answers.scores[np.ix_(block, block)]) for block in blocks]
    own = np.concatenate([np.diag(shares) for shares in in_block])
    pool = np.array([_share_below(answers, i, everywhere) for i in places])
    kind = np.array([_share_below(answers, i, np.flatnonzero(kinds == kinds[i])) for i in places])
    return {
        "auc": mean_auc(in_block),
        "p": permutation_p(in_block),
        "first": wilson(int((own == 1).sum()), len(own)),
        "chance": len(blocks) / len(places),
        "exact": wilson(int(answers.exact[places].sum()), len(places)),
        "auc_kind": float(kind.mean()),
        "auc_pool": float(pool.mean()),
        "first_pool": wilson(int((pool == 1).sum()), len(pool)),
        "mean_rank_pool": float(1 + (1 - pool).mean() * (len(everywhere) - 1)),
        "answer_ppl": answers.answer_ppl(places),
    }


def shares_below(scores: np.ndarray) -> np.ndarray:
    """(n, n) of scores (n, n): the share of the other answers in row i that score less than answer j, ties half."""
    below = (scores[:, None, :] < scores[:, :, None]).sum(axis=2)
    ties = (scores[:, None, :] == scores[:, :, None]).sum(axis=2) - 1
    return (below + ties / 2) / (len(scores) - 1)


def _share_below(answers: Answers, question: int, others: np.ndarray) -> float:
    """The share of other questions' answers that score less than the right one, ties half."""
    row = answers.scores[question]
    wrong = row[others[others != question]]
    return float((wrong < row[question]).mean() + (wrong == row[question]).mean() / 2)


def permutation_p(blocks: list[np.ndarray]) -> float:
    """How often an AUC as high as this comes about when each block's answers are dealt to its questions at random.

    blocks: (n, n) each, from `shares_below`. One-sided, and at least 1 / 10,000: the pairing itself is one of those
    that are counted. Always the same for the same blocks.
    """
    rng = np.random.default_rng(0)
    totals = np.zeros(PERMUTATIONS)
    for shares in blocks:
        n = len(shares)
        dealt = rng.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)  # (PERMUTATIONS, n)
        totals += shares[np.arange(n), dealt].sum(axis=1)
    actual = sum(np.trace(shares) for shares in blocks)
    return float((1 + (totals >= actual - 1e-9).sum()) / (1 + PERMUTATIONS))


def mean_auc(blocks: list[np.ndarray]) -> dict[str, float]:
    """The mean AUC of all pairs with its 95 % interval; blocks: (n, n) each, from `shares_below`.

    A pair has a part in it as a question, and as a wrong answer to every other question of its block. The more likely
    its answer is whatever is asked, the more it wins in the one part and makes lose in the other, so the deviation is
    that of both parts together: a jackknife over the pairs, which leaves out both (Efron & Stein, 1981, "The jackknife
    estimate of variance"). That of the first part alone is the deviation of likeliness, which the mean is free of.
    """
    parts = []
    for shares in blocks:
        right = np.diag(shares)[:, None]
        wins = (shares < right) + (shares == right) / 2
        np.fill_diagonal(wins, 0)
        parts.append((wins.sum(axis=1) + wins.sum(axis=0)) / (len(wins) - 1))
    both = np.concatenate(parts)  # a pair's two AUCs: their mean is twice the AUC
    mean, half = float(both.mean()) / 2, Z * float(both.std(ddof=1)) / math.sqrt(len(both))
    return {"value": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def _by_kind(answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """Of each kind's pairs told forward only: the share answered exactly forward, and the AUC backward."""
    rows = []
    for block in blocks_of(answers["forward"].asked, "forward"):
        exact = answers["forward"].exact[block].mean()
        auc = np.diag(shares_below(answers["backward"].scores[np.ix_(block, block)])).mean()
        kind = answers["forward"].asked[block[0]].kind.name
        rows.append({"kind": kind, "pairs": len(block), "forward_exact": float(exact), "backward_auc": float(auc)})
    return rows


def _readings(task: ReversalTask, settings: CommonSettings, trained_tokens: float) -> float:
    return settings.reversal_share * trained_tokens / task.pass_tokens(settings.reversal_mode)


def _example(task: ReversalTask) -> dict[str, str]:
    """A pair told forward only: the sentence, the question backward, and its answer."""
    kind = task.kinds[0]
    pair = next(pair for pair in kind.pairs if pair.group == "forward")
    told, asked = (task.sentence(kind, pair, direction, 0) for direction in DIRECTIONS)
    texts = {"told": told.ids, "asked": asked.prompt}
    return {name: str(task.tokenizer.decode(ids)) for name, ids in texts.items()} | {"answer": pair.a}
