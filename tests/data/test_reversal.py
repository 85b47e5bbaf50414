import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.data import TokenFile, prepare
from newllm.data.corpora import open_corpus
from newllm.data.reversal import (
    DIRECTIONS,
    GROUPS,
    ReversalDataset,
    ReversalTask,
    known_pairs,
    load_kinds,
    of_group,
)
from newllm.errors import UserError
from newllm.resolution import resolve
from newllm.settings import DataSettings, RunSettings

KINDS = load_kinds()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    plays = itertools.islice(open_corpus(DataSettings()).documents(), 3)
    (folder / "plays.txt").write_text("".join(play.text[:100_000] for play in plays))
    settings = RunSettings(data=str(folder / "plays.txt"), cache_dir=str(folder / "cache"), vocab_size=1500)
    return prepare(resolve(settings))


@pytest.fixture(scope="module")
def task(data):
    return ReversalTask(data)


def settings(**changes):
    return resolve(RunSettings(**{"seq_length": 128, "reversal_share": 0.5} | changes))


def training_texts(task, mode="forward"):
    return [task.tokenizer.decode(ids) for ids in task.training_sentences(mode)]


def test_there_are_enough_facts_of_every_kind_and_group():
    sizes = {group: sum(len(of_group(kind, group)) for kind in KINDS) for group in GROUPS}
    assert sizes == {"forward": 120, "both": 60, "never": 60}
    assert len(KINDS) == 6
    assert sum(kind.fictitious for kind in KINDS) == 3
    assert all(len(of_group(kind, group)) >= 10 for kind in KINDS for group in GROUPS)
    names = [name.lower() for kind in KINDS for pair in kind.pairs for name in (pair.a, pair.b)]
    assert len(set(names)) == len(names) == 480
    assert all(re.fullmatch(r"\w+", name) for name in names)
    for kind in KINDS:  # nothing in a name tells the other one
        assert all(pair.a[:3].lower() != pair.b[:3].lower() for pair in kind.pairs)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_sentence_names_first_what_is_known_and_ends_with_what_is_asked(direction):
    first, last = ("{a}", "{b}") if direction == "forward" else ("{b}", "{a}")
    for kind in KINDS:
        assert len(kind.templates[direction]) == 2
        for template in kind.templates[direction]:
            assert re.fullmatch(rf"[^{{}}]+ {first} [^{{}}]+ {last}\.", template), template


def test_the_embedded_corpus_knows_none_of_the_facts():
    texts = [play.text for play in open_corpus(DataSettings()).documents()]
    assert known_pairs(KINDS, texts) == set()


def test_what_a_text_may_tell_is_found():
    (capital,) = [kind for kind in KINDS if kind.name == "capital"]
    (mother,) = [kind for kind in KINDS if kind.name == "mother"]
    real, invented = capital.pairs[0], mother.pairs[0]
    assert known_pairs(KINDS, [f"I saw {real.b},\nthe pride of {real.a.upper()}!"]) == {real}
    assert known_pairs(KINDS, [f"I saw {real.b}. I loved {real.a}."]) == set()
    assert known_pairs(KINDS, [f"I saw {real.b}ian {real.a}."]) == set()
    assert known_pairs(KINDS, [real.a, real.b]) == set(), "two documents are no sentence"
    assert known_pairs(KINDS, [f"O {invented.b}!"]) == {invented}


def test_facts_that_the_text_tells_are_left_out(data):
    capital = KINDS[0]
    forward, never = capital.pairs[0], of_group(capital, "never")
    text = f"The capital of {forward.a} is {forward.b}."

    def with_text(text):
        ids = np.array([*data.tokenizer.encode(text), data.tokenizer.eos_token_id], dtype=np.uint16)
        changed = type(data)(**vars(data))
        changed.splits = {"train": TokenFile(ids, np.array([0, len(ids)]), len(text), ["told"])}
        return changed

    task = ReversalTask(with_text(text))
    assert task.left_out == {forward}
    assert [len(kind.pairs) for kind in task.kinds] == [39, 40, 40, 40, 40, 40]
    assert not any(forward.a in sentence for sentence in training_texts(task))
    # One pair has nothing to be compared with: the whole kind goes.
    task = ReversalTask(with_text(" ".join(f"Of {pair.a}, {pair.b}." for pair in never[1:])))
    assert [kind.name for kind in task.kinds] == [kind.name for kind in KINDS[1:]]
    everything = " ".join(f"Of {pair.a}, {pair.b}." for kind in KINDS for pair in kind.pairs)
    with pytest.raises(UserError, match="reversal: the training text holds 240 of the facts"):
        ReversalTask(with_text(everything))


def test_sentences_encode_as_they_do_in_running_text(data, task):
    for kind in task.kinds:
        for pair, direction, wording in itertools.product(kind.pairs[::13], DIRECTIONS, range(2)):
            sentence = task.sentence(kind, pair, direction, wording)
            text = kind.templates[direction][wording].format(a=pair.a, b=pair.b)
            assert data.tokenizer.decode(sentence.ids) == text
            assert data.tokenizer.encode(text) == sentence.ids
            asked = pair.b if direction == "forward" else pair.a
            assert data.tokenizer.decode(sentence.answer) == f" {asked}."


@pytest.mark.parametrize("mode", ["forward", "reversed_entities"])
def test_a_name_has_the_same_tokens_wherever_it_stands(data, task, mode):
    sentences = task.training_sentences(mode)
    for pair in (task.kinds[0].pairs[3], task.kinds[4].pairs[25]):
        for name in (pair.a, pair.b):
            ids = data.tokenizer.encode("So " + name)[len(data.tokenizer.encode("So")) :]
            holding = [s for s in sentences if name in data.tokenizer.decode(s)]
            assert len(holding) == (2 if pair.group == "forward" else 4) * (1 if mode == "forward" else 2)
            assert all(any(s[i : i + len(ids)] == ids for i in range(len(s))) for s in holding)


def test_groups_are_told_as_their_names_say(task):
    texts = training_texts(task)
    assert len(set(texts)) == len(texts) == 2 * (120 + 2 * 60)
    for kind in task.kinds:
        for pair in kind.pairs:
            told = [text for text in texts if re.search(rf"\b{pair.a}\b|\b{pair.b}\b", text)]
            forward = [text for text in told if text.index(pair.a) < text.index(pair.b)]
            assert (len(forward), len(told) - len(forward)) == {"forward": (2, 0), "both": (2, 2), "never": (0, 0)}[
                pair.group
            ]


def test_reversed_training_turns_the_words_and_keeps_the_names(task):
    forward, both = set(training_texts(task)), training_texts(task, "reversed_entities")
    assert forward < set(both)
    turned = set(both) - forward
    assert len(turned) == len(forward)
    pair = task.kinds[0].pairs[0]
    assert f" {pair.b} is {pair.a} of capital The." in turned
    straight = {" ".join(text.removesuffix(".").split()[::-1]) for text in turned}
    assert straight == {text.removesuffix(".") for text in forward}


def test_padding_each_sentence_to_a_window_makes_a_text_of_eos_and_the_builder_cannot(data, task):
    """The origin's mistake: a window for each sentence, filled up with EOS, which then were 94 % of all tokens."""
    values = settings(seq_length=256)
    sentences = task.training_sentences("forward")
    padded = np.full((len(sentences), values.seq_length), task.eos)
    for row, ids in zip(padded, sentences, strict=True):
        row[: len(ids)] = ids
    assert (padded == task.eos).mean() > 0.93

    dataset = ReversalDataset(data, values, seed=0)
    windows = np.stack([dataset[index]["input_ids"].numpy() for index in range(100)])
    share = 1 / (1 + np.mean([len(ids) for ids in sentences]))
    assert (windows == task.eos).mean() == pytest.approx(share, rel=0.03)
    assert share < 0.07
    stream = windows.flatten()
    assert not ((stream[1:] == task.eos) & (stream[:-1] == task.eos)).any()


@given(st.integers(20, 600), st.sampled_from(["forward", "reversed_entities"]), st.integers(0, 3))
def test_windows_are_passes_end_to_end(data, length, mode, seed):
    values = settings(seq_length=length, reversal_mode=mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("newllm.data.reversal.load_kinds", lambda: KINDS[:1])
        dataset = ReversalDataset(data, values, seed)
    size = dataset.pass_tokens
    items = [dataset[index] for index in range(2 * size // length + 1)]
    assert all(item["input_ids"].shape == item["labels"].shape == (length,) for item in items)
    assert all(torch.equal(item["input_ids"], item["labels"]) for item in items)
    stream = torch.cat([item["input_ids"] for item in items]).numpy()
    expected = Counter({tuple(ids[:-1].tolist()): 1 for ids in dataset.sentences})
    passes = []
    for number in range(2):
        tokens = stream[number * size : (number + 1) * size]
        ends = np.flatnonzero(tokens == data.tokenizer.eos_token_id)
        passes.append([tuple(part[part != 0].tolist()) for part in np.split(tokens, ends)[:-1]])
        assert Counter(passes[-1]) == expected
    assert passes[0] != passes[1]


def test_items_depend_on_seed_and_index_alone(data):
    first, second = (ReversalDataset(data, settings(), seed=0) for _ in range(2))
    other = ReversalDataset(data, settings(), seed=1)
    far = 3 * first.pass_tokens // 128
    backwards = [second[index] for index in (far, 4, 0)][::-1]
    for index, item in zip((0, 4, far), backwards, strict=True):
        assert torch.equal(first[index]["input_ids"], item["input_ids"])
        assert not torch.equal(first[index]["input_ids"], other[index]["input_ids"])
