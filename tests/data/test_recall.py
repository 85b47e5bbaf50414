import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.data import TokenFile, prepare
from newllm.data.corpora import open_corpus
from newllm.data.recall import MOST_WORDS, RecallDataset, RecallTask, recall_words
from newllm.data.tasks import WithTasks, stack_windows
from newllm.data.windows import WindowDataset
from newllm.errors import UserError
from newllm.ops.loss import IGNORED
from newllm.resolution import resolve
from newllm.settings import DataSettings, RunSettings

SEGMENT = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    plays = itertools.islice(open_corpus(DataSettings()).documents(), 8)
    (folder / "plays.txt").write_text("".join(play.text for play in plays))
    settings = RunSettings(data=str(folder / "plays.txt"), cache_dir=str(folder / "cache"), vocab_size=2000)
    return prepare(resolve(settings))


def settings(**changes):
    return resolve(RunSettings(**{"seq_length": 256, "recall_segment": SEGMENT, "recall_share": 0.5} | changes))


@pytest.fixture(scope="module")
def task(data):
    return RecallTask(data, settings())


def sentences(data, window, *kinds):
    return [data.tokenizer.decode(window.ids[a:b].tolist()) for kind, a, b in window.parts if kind in kinds]


def told_and_asked(sentence):
    """('call', 'Hamlet', 'ring') of ' Know: they call Hamlet ring.'"""
    return tuple(sentence.rstrip(".").split(" ")[-3:])


def test_words_are_whole_words_of_one_token(data):
    words = recall_words(data.splits["train"], data.tokenizer)
    again = recall_words(data.splits["train"], data.tokenizer)
    assert (words.names, words.answers) == (again.names, again.answers)
    assert 8 <= len(words.names) <= MOST_WORDS == len(words.answers)
    assert {"Rome", "Caesar", "Antony"} <= set(words.names)
    assert {"world", "night", "moon"} <= set(words.answers)
    assert not {"What", "The", "Come"} & set(words.names), "words that only begin sentences name nobody"
    assert not {"that", "with", "they"} & set(words.answers)
    for kind, ids in ((words.names, words.name_ids), (words.answers, words.answer_ids)):
        assert len(set(kind)) == len(kind)
        encoded = [data.tokenizer.encode(" " + word, add_special_tokens=False) for word in kind]
        assert encoded == [[id] for id in ids.tolist()]


def test_a_name_says_nothing_about_its_answer(data):
    words = recall_words(data.splits["train"], data.tokenizer)
    rng = np.random.default_rng(0)
    seen = np.zeros((len(words.names), len(words.answers)))
    for _ in range(4000):
        for name, answer in words.draw(rng, 16):
            seen[name, answer] += 1
    expected = seen.sum() / seen.size
    assert seen.min() > 0
    assert ((seen - expected) ** 2 / expected).mean() == pytest.approx(1, abs=0.1)


def test_sentences_encode_as_they_do_in_running_text(data, task):
    for kind in ("fact", "question"):
        for template in range(3):
            ids, answer = task.sentence(kind, (1, 2), template)[1:]
            text = data.tokenizer.decode(ids)
            assert data.tokenizer.encode("Sir." + text)[-len(ids) :] == ids
            assert ids[answer] == task.words.answer_ids[2]
            assert told_and_asked(text)[1:] == (task.words.names[1], task.words.answers[2])


@given(st.integers(2 * SEGMENT, 500), st.integers(0, 3), st.integers(0, 10**6))
def test_training_windows_ask_every_fact_once_in_a_later_segment(data, task, length, seed, index):
    window = task.training_window(length, seed, index)
    assert len(window.ids) == length
    assert all(start // SEGMENT == (stop - 1) // SEGMENT for _, start, stop in window.parts)
    facts, questions = sentences(data, window, "fact"), sentences(data, window, "question")
    assert sorted(map(told_and_asked, facts)) == sorted(map(told_and_asked, questions))
    assert len({told_and_asked(fact)[1] for fact in facts}) == len({told_and_asked(f)[-1] for f in facts}) == len(facts)
    assert len(questions) == len(window.answers) == len(window.told) >= 1
    place = {
        told_and_asked(data.tokenizer.decode(window.ids[a:b].tolist())): a for k, a, b in window.parts if k == "fact"
    }
    for kind, start, stop in window.parts:
        if kind == "question":
            pair = told_and_asked(data.tokenizer.decode(window.ids[start:stop].tolist()))
            assert place[pair] // SEGMENT < start // SEGMENT
    labels = window.labels()
    assert sorted(np.flatnonzero(labels != IGNORED)) == sorted(window.answers)
    assert set(labels[window.answers]) == set(task.words.answer_ids[window.told])


@given(st.integers(1, 20), st.integers(0, 10**6))
def test_evaluation_windows_tell_first_and_ask_last(data, task, distance, index):
    window = task.evaluation_window(distance, index)
    assert len(window.ids) == (distance + 1) * SEGMENT
    (fact,), (question,) = sentences(data, window, "fact"), sentences(data, window, "question")
    assert told_and_asked(fact) == told_and_asked(question)
    assert len(sentences(data, window, "other fact")) == 1
    places = {kind: (start // SEGMENT, (stop - 1) // SEGMENT) for kind, start, stop in window.parts}
    assert places == {"fact": (0, 0), "other fact": (0, 0), "question": (distance, distance)}
    assert window.ids[window.answers[0]] == task.words.answer_ids[window.told[0]]


@pytest.mark.parametrize(("facts", "expected"), [(2, 5 / 6), (3, 19 / 27)])
def test_wordings_alone_tell_more_than_guessing_does(data, facts, expected):
    """What a reader who knows no name gets right among the facts told, as docs/recall.md says."""
    task, right = RecallTask(data, settings(recall_facts=facts)), []
    for index in range(2000):
        window = task.evaluation_window(4, index)
        read = sentences(data, window, "fact", "other fact", "question")
        wordings = [sentence.split(" ")[-4:-2] for sentence in read]  # 'they call', and so on
        right.append(1 / (wordings.count(wordings[-1]) - 1))  # the last is the question, in the words of its fact
    assert np.mean(right) == pytest.approx(expected, abs=0.02)


def test_without_the_sentences_a_window_is_contiguous_text(data, task):
    for window, split in ((task.training_window(256, 0, 5), "train"), (task.evaluation_window(7, 1), "test")):
        text = np.ones(len(window.ids), dtype=bool)
        for _, start, stop in window.parts:
            text[start:stop] = False
        window_text = window.ids[text].astype(data.splits[split].ids.dtype).tobytes()
        assert window_text in np.asarray(data.splits[split].ids).tobytes()


def test_more_facts_than_a_segment_holds_go_into_the_ones_after_it(data):
    task = RecallTask(data, settings(recall_facts=8))
    segments = [start // SEGMENT for kind, start, _ in task.evaluation_window(4, 0).parts if kind != "question"]
    assert len(segments) == 8
    assert max(segments) == 7 // task.sentences_per_segment
    (asked,) = [start // SEGMENT for kind, start, _ in task.evaluation_window(4, 0).parts if kind == "fact"]
    assert asked == 0


def test_items_depend_on_seed_and_index_alone(data):
    first, second = (RecallDataset(data, settings(), seed=0) for _ in range(2))
    other = RecallDataset(data, settings(), seed=1)
    backwards = [second[index] for index in (9, 4, 0)][::-1]
    for index, item in zip((0, 4, 9), backwards, strict=True):
        assert all(torch.equal(first[index][key], item[key]) for key in item)
        assert not torch.equal(first[index]["input_ids"], other[index]["input_ids"])
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])


@given(st.integers(64, 600), st.integers(0, 40), st.integers(1, 5), st.floats(0, 1, exclude_max=True))
def test_windows_grow_from_two_segments_to_the_whole_length(data, length, steps, per_step, curriculum):
    recall = RecallDataset(data, settings(seq_length=length, recall_curriculum=curriculum), seed=0)
    recall.expect(steps, per_step)
    lengths = [[recall.window_length(step * per_step + item) for item in range(per_step)] for step in range(steps + 1)]
    assert all(len(set(step)) == 1 for step in lengths), "the items of a step have one length"
    by_step = [step[0] for step in lengths]
    assert by_step == sorted(by_step)
    assert by_step[-1] == length
    if curriculum * steps > 0:
        assert by_step[0] == 2 * SEGMENT
    assert all(n == length for step, n in enumerate(by_step) if step >= curriculum * steps)


def test_short_windows_stand_in_place_of_a_long_one(data):
    recall = RecallDataset(data, settings(seq_length=200, recall_curriculum=0.5), seed=0)
    recall.expect(steps=10, items_per_step=2)
    batch = stack_windows([recall[0], recall[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (6, 64)
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 6
    assert ((batch["labels"] != IGNORED).sum(dim=1) > 0).all()
    assert recall[19]["input_ids"].shape == (1, 200)


def test_recall_follows_the_last_text_window(data):
    windows, recall = WindowDataset(data.splits["train"], 256, samples=10), RecallDataset(data, settings(), 0)
    both = WithTasks(windows, [recall])
    assert len(both) == 10
    assert torch.equal(both[9]["input_ids"], windows[9]["input_ids"])
    assert torch.equal(both[10]["labels"], recall[0]["labels"])
    assert both[10]["input_ids"].dtype == both[10]["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall_segment": 5}, r"--recall-segment is 5: .* it must be at least \d+"),
        ({"recall_segment": 200}, "--recall-segment is 200: .* at most 128 is possible"),
        ({"recall_facts": 50}, "--recall-facts is 50: at most .* fit into 1 segments of 32 tokens"),
        ({"recall_distances": [0, 4]}, "none below 1"),
        ({"recall_distances": []}, "give at least one"),
        ({"recall_distances": [4, 1, 4]}, "give each only once"),
        ({"recall_distances": [10**6]}, "--recall-distances: a distance of 1000000 takes 32,000,032 tokens"),
    ],
)
def test_what_no_window_can_be_made_of_is_one_line(data, changes, message):
    values = settings(**changes)
    with pytest.raises(UserError, match=message):
        RecallDataset(data, values, seed=0).task.check_evaluation(values.recall_distances)


def test_a_text_without_names_is_one_line(data):
    ids = np.array(data.tokenizer.encode("the night and the moon and the night. " * 50), dtype=np.uint16)
    tokens = TokenFile(ids, np.array([0, len(ids)]), 100, ["night"])
    with pytest.raises(UserError, match=r"only 0 capitalised words .* a larger --vocab-size or more text"):
        recall_words(tokens, data.tokenizer)
