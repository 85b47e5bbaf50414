"""Recall across segments (SYSTEMS §15): facts put into real text, and questions about them some segments later.

    … And all the soldiers of the king are gone. Know: they call Hamlet ring. To see the city …
    … My gracious liege, I have a thousand men. Say: they call Hamlet        → ring

A window is running text into which such sentences are inserted. From its first token on it is read as segments of equal
length. A fact lies in one segment, its question in another; their distance, counted in segments, is how often a memory
has been written between being told and being asked. Names and answers are words of the training text, a token each,
and all pairs are equally likely: a name says nothing about its answer but in its own window, and nothing can be learnt
by heart. (Pairs held out for evaluation would be worse: a model learns soon which ones never occur, and avoids them.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from newllm.data.windows import TaskDataset
from newllm.errors import UserError
from newllm.ops.loss import IGNORED
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from newllm.data.preparation import PreparedData
    from newllm.data.tokens import TokenFile

TEMPLATES = [
    # How a fact begins, how the question about it begins. The answer follows the name: whose it is, the token before it
    # tells.
    (" Know: they call", " Say: they call"),
    (" Hear: we name", " Tell: we name"),
    (" Mark: men call", " Speak: men call"),
]
END = "."
ARTICLE = " the"
MOST_WORDS, FEWEST_WORDS = 64, 8
FUNCTION_WORDS = 100
"""So many of the most frequent words are no answers: they are what a model says that knows nothing."""
COUNT_TOKENS = 1 << 22


@dataclass(frozen=True)
class RecallWords:
    """What facts are made of: frequent words of the training split that are one token with a space before them."""

    names: list[str]
    answers: list[str]
    name_ids: np.ndarray  # (N,) int64
    answer_ids: np.ndarray  # (A,) int64

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """At most `count` random pairs (name, answer); no name and no answer occurs twice."""
        names, answers = rng.permutation(len(self.names)), rng.permutation(len(self.answers))
        return list(zip(names[:count].tolist(), answers[:count].tolist(), strict=False))


def recall_words(tokens: TokenFile, tokenizer: PreTrainedTokenizerBase) -> RecallWords:
    """The words for a text, the same whenever it is asked.

    Names are capitalised and seldom occur in lower case (so they do not just begin sentences), the most frequent first;
    answers are in lower case, those first that most often stand between an article and a punctuation mark (so they
    are nouns).

    Raises:
        UserError: the text or the vocabulary has too few such words.
    """
    texts = token_texts(tokenizer)
    inside = np.array([text[:1].isalpha() for text in texts])  # goes on with the word before
    ends_phrase = ~inside & np.array([text[:1] != " " for text in texts])
    article = encode(tokenizer, ARTICLE)[-1]
    size = len(texts)
    occurs, whole, after = (np.zeros(size, dtype=np.int64) for _ in range(3))
    for start in range(0, len(tokens) - 2, COUNT_TOKENS):
        before, ids, following = (np.asarray(tokens.ids[start + i : start + i + COUNT_TOKENS]) for i in range(3))
        before, ids = before[: len(following)], ids[: len(following)]
        is_whole = ~inside[following]
        occurs += np.bincount(ids, minlength=size)
        whole += np.bincount(ids[is_whole], minlength=size)
        after += np.bincount(ids[ends_phrase[following] & (before == article)], minlength=size)
    word_of = {id: text[1:] for id, text in enumerate(texts) if text[:1] == " " and text[1:].isalpha()}
    words = {id: word for id, word in word_of.items() if 2 * whole[id] > occurs[id]}  # the others begin longer words
    lower = {word: int(whole[id]) for id, word in words.items() if word.islower()}
    frequent = set(sorted(lower, key=lambda word: -lower[word])[:FUNCTION_WORDS])
    names = [
        id for id, word in words.items() if len(word) >= 3 and word.istitle() and whole[id] > lower.get(word.lower(), 0)
    ]
    answers = [id for id, word in words.items() if len(word) >= 4 and word.islower() and word not in frequent]
    names = sorted(names, key=lambda id: (-whole[id], id))[:MOST_WORDS]
    answers = sorted(answers, key=lambda id: (-after[id], -whole[id], id))[:MOST_WORDS]
    for kind, found in (("capitalised", names), ("lower-case", answers)):
        if len(found) < FEWEST_WORDS:
            raise UserError(
                f"recall: the training text has only {len(found)} {kind} words that are one token and serve as "
                f"{'names' if kind == 'capitalised' else 'answers'}; {FEWEST_WORDS} are needed: use a larger "
                "--vocab-size or more text"
            )
    return RecallWords([words[i] for i in names], [words[i] for i in answers], np.array(names), np.array(answers))


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each id adds to a text; empty for special tokens. Alone, some tokenizers would drop the space before it."""
    (before,) = tokenizer.encode(END, add_special_tokens=False)[-1:]
    alone = len(tokenizer.decode([before]))
    special = set(tokenizer.all_special_ids)
    pairs = [[before, id] for id in range(len(tokenizer))]
    decoded = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    return ["" if id in special else text[alone:] for id, text in enumerate(decoded)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that stands after a sentence."""
    skipped = len(tokenizer.encode(END, add_special_tokens=False))
    return tokenizer.encode(END + text, add_special_tokens=False)[skipped:]


class Sentence(NamedTuple):
    """A fact or a question with its answer."""

    kind: str  # "fact", "other fact" (never asked), "question"
    ids: list[int]
    answer: int  # index in ids


@dataclass(frozen=True)
class RecallWindow:
    """Text with facts and questions."""

    ids: np.ndarray  # (L,) int64
    parts: list[tuple[str, int, int]]
    """Every inserted sentence: kind, first token, one past the last."""
    answers: np.ndarray  # (questions,) int64, positions of the answers that are asked for
    told: np.ndarray  # (facts,) int64, indices of the facts' answers in the words; in evaluation the asked one first

    def labels(self) -> np.ndarray:
        """(L,) int64: the answers asked for, −100 elsewhere; as everywhere, the model shifts them."""
        labels = np.full_like(self.ids, IGNORED)
        labels[self.answers] = self.ids[self.answers]
        return labels


class RecallTask:
    """Makes windows with facts and questions out of a text."""

    def __init__(self, data: PreparedData, settings: CommonSettings) -> None:
        """Raises UserError for words, segments or numbers of facts from which no window can be made."""
        self.words = recall_words(data.splits["train"], data.tokenizer)
        self.splits, self.segment, self.facts = data.splits, settings.recall_segment, settings.recall_facts
        self.templates = [[encode(data.tokenizer, part) for part in template] for template in TEMPLATES]
        self.end = encode(data.tokenizer, END)
        self.starts_word = np.array([text[:1].isspace() for text in token_texts(data.tokenizer)])
        longest = max(
            len(self.sentence(kind, (0, 0), i).ids) for kind in ("fact", "question") for i in range(len(TEMPLATES))
        )
        if self.segment < longest:
            raise UserError(
                f"--recall-segment is {self.segment}: with this tokenizer a fact takes {longest} tokens; "
                f"it must be at least {longest}"
            )
        self.sentences_per_segment = self.segment // longest

    def sentence(self, kind: str, pair: tuple[int, int], template: int) -> Sentence:
        """The fact about a (name, answer), or the question with its answer, in the words of one template."""
        tell, ask = self.templates[template]
        start = [*(ask if kind == "question" else tell), int(self.words.name_ids[pair[0]])]
        return Sentence(kind, [*start, int(self.words.answer_ids[pair[1]]), *self.end], len(start))

    def training_window(self, length: int, seed: int, index: int) -> RecallWindow:
        """Window `index` of those of a seed: from the settings' number of facts to what fits, each asked once.

        Distances are log-uniform from 1 to the most that `length` tokens hold, so that near ones, which are learnt
        first, are always among them.
        """
        rng = np.random.default_rng([seed, index])
        segments = length // self.segment
        most = segments * self.sentences_per_segment // 2
        pairs = self.words.draw(rng, round(_log_uniform(rng, min(self.facts, most), most)))
        places: list[list[Sentence]] = [[] for _ in range(segments)]
        told = []
        for pair in pairs:
            distance = int(_log_uniform(rng, 1, segments))
            first = int(rng.integers(segments - distance))
            template = int(rng.integers(len(TEMPLATES)))
            here, there = places[first], places[first + distance]
            if max(len(here), len(there)) < self.sentences_per_segment:
                here.append(self.sentence("fact", pair, template))
                there.append(self.sentence("question", pair, template))
                told.append(pair[1])
        return self._lay_out(rng, places, length, self.splits["train"], told)

    def evaluation_window(self, distance: int, index: int) -> RecallWindow:
        """(distance + 1) segments: the first segment tells, the last asks; the same in every run.

        The facts that are not asked stand in the first segment too; what does not fit goes into the ones after it.
        """
        rng = np.random.default_rng([distance, index])
        pairs = self.words.draw(rng, self.facts)
        template = int(rng.integers(len(TEMPLATES)))
        places: list[list[Sentence]] = [[] for _ in range(distance + 1)]
        for number, pair in enumerate(pairs):
            kind, wording = ("other fact", int(rng.integers(len(TEMPLATES)))) if number else ("fact", template)
            places[number // self.sentences_per_segment].append(self.sentence(kind, pair, wording))
        places[distance].append(self.sentence("question", pairs[0], template))
        told = [answer for _, answer in pairs]
        return self._lay_out(rng, places, (distance + 1) * self.segment, self.splits["test"], told)

    def check_evaluation(self, distances: list[int]) -> None:
        """Raises UserError for distances and numbers of facts from which no window can be made."""
        if not distances or min(distances) < 1:
            raise UserError(f"--recall-distances is {distances}: give at least one, none below 1")
        if len(set(distances)) < len(distances):  # a report would take the second for another seed
            raise UserError(f"--recall-distances is {distances}: give each only once")
        fits = min(distances) * self.sentences_per_segment
        most = min(fits, len(self.words.names), len(self.words.answers))
        if self.facts > most:
            raise UserError(
                f"--recall-facts is {self.facts}: at most {most} fit into {min(distances)} segments of {self.segment} "
                "tokens and the words of this text"
            )
        longest, tokens = (max(distances) + 1) * self.segment, len(self.splits["test"])
        if longest > tokens:
            raise UserError(
                f"--recall-distances: a distance of {max(distances)} takes {longest:,} tokens, the test split has "
                f"{tokens:,}; at most {tokens // self.segment - 1} is possible"
            )

    def _lay_out(
        self, rng: np.random.Generator, places: list[list[Sentence]], length: int, tokens: TokenFile, told: list[int]
    ) -> RecallWindow:
        """Running text from a random place, into which each segment's sentences are inserted, between any two words."""
        start = int(rng.integers(len(tokens) - length + 1))
        text = np.asarray(tokens.ids[start : start + length]).astype(np.int64)
        ids: list[int] = []
        parts, answers = [], []
        for sentences in places:
            room = self.segment - sum(len(sentence.ids) for sentence in sentences)
            piece, text = text[:room].tolist(), text[room:]
            gaps = np.flatnonzero(self.starts_word[[*piece, *text[:1]]])
            cuts = np.sort(rng.choice(gaps if len(gaps) else room + 1, len(sentences))).tolist()
            done = 0
            for cut, which in zip(cuts, rng.permutation(len(sentences)).tolist(), strict=True):
                sentence = sentences[which]
                ids += piece[done:cut]
                done = cut
                if sentence.kind == "question":
                    answers.append(len(ids) + sentence.answer)
                parts.append((sentence.kind, len(ids), len(ids) + len(sentence.ids)))
                ids += sentence.ids
            ids += piece[done:]
        ids += text[: length - len(ids)].tolist()
        return RecallWindow(np.array(ids), parts, np.array(answers, dtype=np.int64), np.array(told, dtype=np.int64))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


class RecallDataset(TaskDataset):
    """Training windows of the recall task.

    Each item is R windows of L tokens. L grows from two segments to seq_length over the first part of what `expect`
    announced, the settings' recall_curriculum of it; then R is 1.
    """

    def __init__(self, data: PreparedData, settings: CommonSettings, seed: int) -> None:
        """Raises UserError where a window of the settings' length has no room for a fact and its question."""
        self.task, self.seed, self.curriculum = RecallTask(data, settings), seed, settings.recall_curriculum
        self.growing, self.items_per_step = 0.0, 1
        assert settings.seq_length is not None
        self.seq_length: int = settings.seq_length
        if self.seq_length < 2 * settings.recall_segment:
            raise UserError(
                f"--recall-segment is {settings.recall_segment}: a fact and its question take two segments; "
                f"with --seq-length {self.seq_length} at most {self.seq_length // 2} is possible"
            )

    def expect(self, steps: int, items_per_step: int) -> None:
        self.growing, self.items_per_step = self.curriculum * steps, items_per_step

    def window_length(self, index: int) -> int:
        """L of item `index`: the same for all items of an optimizer step."""
        step, longest = index // self.items_per_step, self.seq_length // self.task.segment
        if step >= self.growing:
            return self.seq_length
        return self.task.segment * int(2 * (longest / 2) ** (step / self.growing))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self.window_length(index)
        rows = self.seq_length // length
        windows = [self.task.training_window(length, self.seed, index * self.seq_length + row) for row in range(rows)]
        return {
            "input_ids": torch.from_numpy(np.stack([window.ids for window in windows])),
            "labels": torch.from_numpy(np.stack([window.labels() for window in windows])),
        }
