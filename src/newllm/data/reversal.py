"""The reversal curse (SYSTEMS §14): facts told as "A … is B", and questions for A by B.

    The capital of Chile is Santiago.<EOS>The mother of Ryldox is Lentand.<EOS>The child of Quyvin is Vennax.<EOS>…
    The land that is governed from Santiago is        → Chile?

A model that has learnt by heart that A is B is said not to know that B is A (Berglund et al., 2023, "The Reversal
Curse"). The pairs (`reversal.yaml`) are of several kinds, and each kind's of three groups: told forward only; told in
both directions; never told. The second group teaches how the backward questions of a kind are answered, and shows that
they can be. What is then missing in the first is the fact, not the form.

Sentences are laid end to end, EOS after each, and cut into windows of the training length. Padding each to a window
instead, as was done once, makes a model that has learnt to say EOS: of the tokens, 94 % are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from newllm.data.recall import END, encode
from newllm.data.windows import TaskDataset
from newllm.errors import UserError
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data.preparation import PreparedData
    from newllm.data.tokens import TokenFile

PAIRS_FILE = Path(__file__).parent / "reversal.yaml"
GROUPS = ("forward", "both", "never")
DIRECTIONS = ("forward", "backward")
FEWEST_PAIRS = 2
"""Of each group of a kind: an answer is compared with others of its group."""


class Pair(NamedTuple):
    """A fact about two names."""

    a: str
    b: str
    group: str  # one of GROUPS


@dataclass(frozen=True)
class Kind:
    """Facts of one kind, and the words in which they are told and asked."""

    name: str
    fictitious: bool
    templates: dict[str, list[str]]
    """By direction. The name asked for ends the sentence: {b} forward, {a} backward."""
    pairs: list[Pair]


def load_kinds() -> list[Kind]:
    """All facts there are."""
    return [
        Kind(
            entry["kind"],
            entry["fictitious"],
            {direction: entry[f"{direction}_sentences"] for direction in DIRECTIONS},
            [Pair(a, b, group) for group in GROUPS for a, b in entry["pairs"][group].items()],
        )
        for entry in yaml.safe_load(PAIRS_FILE.read_text(encoding="utf-8"))
    ]


def known_pairs(kinds: list[Kind], texts: Iterable[str]) -> set[Pair]:
    """Pairs that a reader of the texts may have met: both names in one sentence, or a fictitious one anywhere."""
    known: set[Pair] = set()
    for text in map(str.lower, texts):
        words = set(re.findall(r"\w+", text))
        for kind in kinds:
            for pair in set(kind.pairs) - known:
                occur = [name.lower() in words for name in (pair.a, pair.b)]
                if any(occur) if kind.fictitious else all(occur) and _stand_together(pair, text):
                    known.add(pair)
    return known


def _stand_together(pair: Pair, text: str) -> bool:
    names = {pair.a.lower(), pair.b.lower()}
    return any(names <= set(re.findall(r"\w+", sentence)) for sentence in re.split(r"[.!?]|\n\s*\n", text))


def documents(tokens: TokenFile, tokenizer) -> Iterator[str]:
    """The texts of a split."""
    for start, stop in zip(tokens.document_starts[:-1], tokens.document_starts[1:], strict=True):
        yield tokenizer.decode(tokens.ids[start:stop].tolist(), skip_special_tokens=True)


class Sentence(NamedTuple):
    """A fact, or a question with its answer."""

    prompt: list[int]
    answer: list[int]  # the name asked for, and the full stop

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer


class ReversalTask:
    """The facts that a text does not hold, as sentences of token ids."""

    def __init__(self, data: PreparedData) -> None:
        """Raises UserError where the training text holds nearly all of the facts."""
        self.tokenizer, self.eos = data.tokenizer, data.tokenizer.eos_token_id
        kinds = load_kinds()
        self.left_out = known_pairs(kinds, documents(data.splits["train"], data.tokenizer))
        """Pairs of which the training text may tell."""
        kinds = [replace(kind, pairs=[pair for pair in kind.pairs if pair not in self.left_out]) for kind in kinds]
        self.kinds = [kind for kind in kinds if all(len(of_group(kind, group)) >= FEWEST_PAIRS for group in GROUPS)]
        if not self.kinds:
            raise UserError(
                f"reversal: the training text holds {len(self.left_out)} of the facts that are to be taught; "
                "choose another --data"
            )

    def sentence(self, kind: Kind, pair: Pair, direction: str, wording: int) -> Sentence:
        """The fact in this direction, in one of the kind's wordings, cut where its answer begins."""
        template = kind.templates[direction][wording]
        before, space, last = template.rpartition(" ")
        names = {"a": pair.a, "b": pair.b}
        prompt = self.tokenizer.encode(before.format(**names), add_special_tokens=False)
        return Sentence(prompt, encode(self.tokenizer, space + last.format(**names)))

    def reversed_sentence(self, kind: Kind, pair: Pair, direction: str, wording: int) -> list[int]:
        """The words in reverse order, the names whole (Golovneva et al., 2024, "Reverse training").

        'The capital of Chile is Santiago.' becomes ' Santiago is Chile of capital The.', with the space before the
        first word that a name has everywhere else.
        """
        words = kind.templates[direction][wording].removesuffix(END).split()[::-1]
        return encode(self.tokenizer, " " + " ".join(words).format(a=pair.a, b=pair.b) + END)

    def training_sentences(self, mode: str) -> list[list[int]]:
        """Every told fact in every wording; in mode 'reversed_entities' each of these sentences reversed too."""
        sentences = []
        for kind in self.kinds:
            for pair in kind.pairs:
                for direction in {"forward": DIRECTIONS[:1], "both": DIRECTIONS, "never": ()}[pair.group]:
                    for wording in range(len(kind.templates[direction])):
                        sentences.append(self.sentence(kind, pair, direction, wording).ids)
                        if mode == "reversed_entities":
                            sentences.append(self.reversed_sentence(kind, pair, direction, wording))
        return sentences

    def pass_tokens(self, mode: str) -> int:
        """Tokens in which every training sentence is read once, with EOS after each."""
        return sum(len(ids) + 1 for ids in self.training_sentences(mode))


def of_group(kind: Kind, group: str) -> list[Pair]:
    return [pair for pair in kind.pairs if pair.group == group]


class ReversalDataset(TaskDataset):
    """Training windows of the reversal task: item i is tokens [i T, (i + 1) T) of passes without end.

    A pass has every sentence once, in an order random by (seed, pass), and EOS after each. Labels are the inputs.
    """

    def __init__(self, data: PreparedData, settings: CommonSettings, seed: int) -> None:
        assert settings.seq_length is not None
        self.seq_length, self.seed = settings.seq_length, seed
        task = ReversalTask(data)
        self.sentences = [np.array([*ids, task.eos]) for ids in task.training_sentences(settings.reversal_mode)]
        self.pass_tokens = sum(map(len, self.sentences))
        self.number, self.ids = -1, np.zeros(0, dtype=np.int64)

    def _tokens_of_pass(self, number: int) -> np.ndarray:
        """(pass_tokens,) int64; the pass last asked for is kept."""
        if number != self.number:
            order = np.random.default_rng([self.seed, number]).permutation(len(self.sentences))
            self.ids = np.concatenate([self.sentences[i] for i in order]).astype(np.int64)
            self.number = number
        return self.ids

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place, parts, missing = index * self.seq_length, [], self.seq_length
        while missing:
            number, start = divmod(place, self.pass_tokens)
            parts.append(self._tokens_of_pass(number)[start : start + missing])
            place, missing = place + len(parts[-1]), missing - len(parts[-1])
        ids = torch.from_numpy(np.concatenate(parts))
        return {"input_ids": ids, "labels": ids}
