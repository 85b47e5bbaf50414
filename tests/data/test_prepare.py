import errno
import json
import shutil
from itertools import chain, pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import newllm.data.preparation as module
from newllm.data import describe, prepare, sample_text
from newllm.errors import UserError
from newllm.settings import DataSettings, RunSettings

TEXTS = [
    f"Act {i}.\n\nEnter king number {i}, with {i * 7} lords and a fool named Touch{i}.\n" * (i % 4 + 1)
    for i in range(40)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def settings(path, tmp_path, **values):
    return DataSettings(
        data=str(path), cache_dir=str(tmp_path / "cache"), **{"tokenizer": "bpe", "vocab_size": 300} | values
    )


def documents(data, split):
    tokens = data.splits[split]
    starts = tokens.document_starts
    for begin, end in pairwise(starts):
        ids = tokens.ids[begin:end].tolist()
        assert ids[-1] == data.tokenizer.eos_token_id
        assert data.tokenizer.eos_token_id not in ids[:-1]
        yield data.tokenizer.decode(ids[:-1])


def test_every_document_is_in_exactly_one_split(corpus, tmp_path):
    data = prepare(settings(corpus, tmp_path, validation_share=0.2, test_share=0.2))
    texts = {split: list(documents(data, split)) for split in data.splits}
    assert sorted(chain.from_iterable(texts.values())) == sorted(TEXTS)
    assert all(texts.values())
    for split, tokens in data.splits.items():
        assert tokens.num_bytes == sum(len(text.encode()) for text in texts[split])
        assert (
            tokens.num_documents == len(tokens.titles) == data.info["splits"][split]["documents"] == len(texts[split])
        )
        assert tokens.ids.dtype == np.uint16
        assert len(tokens) == data.info["splits"][split]["tokens"] == tokens.document_starts[-1]
    json.dumps(data.info)
    assert texts["test"][0].startswith(sample_text(data, "test", tokens=5))
    assert dict(describe(data))["corpus"] == corpus.name


def test_second_time_comes_from_the_cache(corpus, tmp_path):
    messages = []
    first = prepare(settings(corpus, tmp_path), messages.append)
    made = len(messages)
    second = prepare(settings(corpus, tmp_path), messages.append)
    assert made > 0
    assert len(messages) == made
    assert first.fingerprint == second.fingerprint
    assert first.info == second.info
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def test_another_spelling_of_a_path_is_the_same_text(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    spellings = [str(corpus), "corpus.jsonl", "./corpus.jsonl", "sub/../corpus.jsonl"]
    assert len({prepare(settings(spelling, tmp_path)).fingerprint for spelling in spellings}) == 1
    runs = [RunSettings(data=spelling, tokenizer=folder) for spelling in spellings for folder in ("sub", "./sub")]
    assert len({run.hash() for run in runs}) == 1
    assert len({RunSettings(data=data).hash() for data in (".", "hf:.", "hf:./sub/..")}) == 2


def test_a_folder_whose_name_is_no_text_is_told_by_its_bytes(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "caf\udce9"
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    shutil.copy(corpus, folder)
    monkeypatch.chdir(folder)
    assert prepare(settings(".", tmp_path)).info["corpus"] == r"caf\xe9"


def test_cache_notices_changed_text_and_settings(corpus, tmp_path):
    fingerprints = {
        prepare(settings(corpus, tmp_path, **v)).fingerprint for v in ({}, {"vocab_size": 290}, {"test_share": 0.1})
    }
    corpus.write_text(corpus.read_text().replace("king", "duke"))
    fingerprints.add(prepare(settings(corpus, tmp_path)).fingerprint)
    assert len(fingerprints) == 4


@pytest.mark.parametrize("when", ["reading", "encoding", "checking"])
def test_interruption_leaves_nothing_behind(corpus, tmp_path, when):
    def interrupt(message):
        if message.startswith(when):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(corpus, tmp_path), interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_preparations_at_once(corpus, tmp_path):
    inner = []

    def meanwhile(message):
        if not inner:
            inner.append(None)
            inner.append(prepare(settings(corpus, tmp_path)))

    outer = prepare(settings(corpus, tmp_path), meanwhile)
    assert np.array_equal(outer.splits["train"].ids, inner[1].splits["train"].ids)
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [outer.fingerprint]


@pytest.mark.parametrize("damage", ["truncate", "remove", "empty folder"])
def test_damaged_cache_is_made_again(corpus, tmp_path, damage):
    data = prepare(settings(corpus, tmp_path))
    expected = np.array(data.splits["train"].ids)
    folder = data.tokenizer_dir.parent
    if damage == "truncate":
        (folder / "train.ids").write_bytes((folder / "train.ids").read_bytes()[:-2])
    elif damage == "remove":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert np.array_equal(prepare(settings(corpus, tmp_path)).splits["train"].ids, expected)


def test_large_vocabulary_of_a_ready_tokenizer_uses_32_bits(corpus, tmp_path):
    vocabulary = {"<eos>": 0} | {f"unused{i}": i for i in range(1, 70_000)} | {"king": 70_000}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>").save_pretrained(
        tmp_path / "words"
    )
    data = prepare(settings(corpus, tmp_path, tokenizer=str(tmp_path / "words")))
    # Weights beside the tokenizer, as in a model folder, change nothing; the tokenizer's own files do.
    (tmp_path / "words" / "model.safetensors").write_bytes(b"weights")
    assert prepare(settings(corpus, tmp_path, tokenizer=str(tmp_path / "words"))).fingerprint == data.fingerprint
    (tmp_path / "words" / "added_tokens.json").write_text("{}")
    assert prepare(settings(corpus, tmp_path, tokenizer=str(tmp_path / "words"))).fingerprint != data.fingerprint
    assert data.splits["train"].ids.dtype == np.uint32
    assert data.splits["train"].ids.max() == 70_000
    assert len(data.tokenizer) == data.info["vocab_size"] == 70_001


def test_too_short_for_a_window_says_what_would_fit(corpus, tmp_path):
    with pytest.raises(UserError, match="too little text for windows of 100000 tokens") as caught:
        prepare(settings(corpus, tmp_path, seq_length=100_000))
    shortest = int(str(caught.value).split("--seq-length ")[1].split()[0])
    prepare(settings(corpus, tmp_path, seq_length=shortest))
    with pytest.raises(UserError):
        prepare(settings(corpus, tmp_path, seq_length=shortest + 1))


@pytest.mark.parametrize(
    ("data", "content", "values"),
    [
        ("x.txt", b"one", {}),
        ("shakespeare", None, {"max_documents": 4}),
        ("x.txt", b"word " * 90, {"validation_share": 0}),
    ],
)
def test_empty_split(tmp_path, data, content, values):
    if content is not None:
        (tmp_path / data).write_bytes(content)
    with pytest.raises(UserError, match=r"no text is left for the (validation|test|train) split") as caught:
        prepare(settings(data if content is None else tmp_path / data, tmp_path, **values))
    assert ("--validation-share" in str(caught.value)) == (data != "shakespeare"), "its split is fixed"


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_corpus(tmp_path, content):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match="no text in it"):
        prepare(settings(tmp_path / "x.txt", tmp_path))


def test_cache_folder_that_is_a_file(corpus, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cannot write the prepared data to .*cache.*--cache-dir"):
        prepare(settings(corpus, tmp_path))


def test_full_disk(corpus, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tokens", full)
    with pytest.raises(UserError, match=r"cache: No space left on device"):
        prepare(settings(corpus, tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_from_the_environment(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "elsewhere"))
    data = prepare(DataSettings(data=str(corpus), vocab_size=300))
    assert data.tokenizer_dir.is_relative_to(tmp_path / "elsewhere")


def test_embedded_plays(tmp_path):
    data = prepare(DataSettings(tokenizer="bpe", vocab_size=400, seq_length=256, cache_dir=str(tmp_path)))
    counts = data.info["splits"]
    assert [counts[split]["documents"] for split in ("train", "validation", "test")] == [32, 3, 3]
    total = sum(count["bytes"] for count in counts.values())
    assert all(0.06 < counts[split]["bytes"] / total < 0.08 for split in ("validation", "test"))
    assert data.info["overlap"]["validation"] < 1e-3
    assert data.info["overlap"]["test"] < 1e-3
    assert "macbeth" in data.splits["test"].titles
    assert "Enter three Witches" in sample_text(data, "test", 200_000)
