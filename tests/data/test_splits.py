from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm.data.corpora import Corpus, Document
from newllm.data.splits import SPLITS, Spool, split_documents
from newllm.errors import UserError


@pytest.fixture(scope="module")
def spool_path(tmp_path_factory):
    return tmp_path_factory.mktemp("spool") / "texts"


def split(path, texts, validation=0.1, test=0.1):
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    corpus = Corpus("own", "", lambda: iter(documents))
    spool = Spool(path, corpus.documents())
    splits, how = split_documents(spool, corpus, validation, test)
    return {name: [document.text for document in spool.read(splits[name])] for name in SPLITS}, how


@given(st.lists(st.text(min_size=1, max_size=5), min_size=3), st.floats(0, 0.45), st.floats(0, 0.45))
def test_equal_documents_share_a_side_and_no_split_is_empty(spool_path, texts, validation, test):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    if len(set(texts)) < 3:
        return
    splits, how = split(spool_path, texts, validation, test)
    assert "by a hash of their text" in how
    assert sorted(chain.from_iterable(splits.values())) == sorted(texts)
    assert all(splits.values())
    sides = [set(part) for part in splits.values()]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_split_depends_on_text_not_on_order(spool_path):
    texts = [f"document {i}" for i in range(200)]
    forward, _ = split(spool_path, texts)
    backward, _ = split(spool_path, texts[::-1])
    assert {name: sorted(part) for name, part in forward.items()} == {
        name: sorted(part) for name, part in backward.items()
    }
    assert 10 <= len(forward["validation"]) <= 30
    assert 10 <= len(forward["test"]) <= 30


def test_single_document_is_cut_at_paragraph_ends(spool_path):
    text = "".join(f"Paragraph {i}, of some words.\n\n" for i in range(300))
    splits, how = split(spool_path, [text])
    assert "only 1 distinct document" in how
    parts = [splits[name] for name in SPLITS]
    assert "".join(list(chain.from_iterable(parts))) == text
    assert all(len(part) == 1 and part[0].startswith("Paragraph") and part[0].endswith("\n\n") for part in parts)
    assert len(parts[1][0]) / len(text) == pytest.approx(0.1, abs=0.05)


@given(st.text(min_size=200, max_size=400, alphabet="aé漢🎭 \n"))
def test_cutting_keeps_characters_whole(spool_path, text):
    splits, _ = split(spool_path, [text + "a", text + "a"], 0.3, 0.3)
    joined = "".join("".join(splits[name]) for name in SPLITS)
    assert "".join(joined.split()) == "".join((text + "a").split())  # parts of only blanks are left out


def test_two_documents_are_both_cut(spool_path):
    splits, how = split(spool_path, ["one " * 500, "two " * 500])
    assert "only 2 distinct documents" in how
    assert all(len(part) == 2 for part in splits.values())


def test_nothing_left_to_train_on(spool_path):
    with pytest.raises(UserError, match="leave nothing to train on"):
        split(spool_path, ["a", "b", "c"], 0.5, 0.5)


def test_lone_surrogates_do_not_stop_a_corpus(spool_path):
    splits, _ = split(spool_path, ["a\ud800", "b", "c"])
    assert sorted(chain.from_iterable(splits.values())) == ["a?", "b", "c"]
