import json
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from newllm.data.tokenizer import EOS, encode_documents, load_tokenizer, pieces, train_bpe
from newllm.errors import UserError

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n\n" * 3
BPE = train_bpe([TEXT], 300)


def encode(text):
    return list(chain.from_iterable((ids for ids, _ in encode_documents(BPE, [text]))))


@given(st.text() | st.text(alphabet="be to\n\r\t '.1é漢🎭") | st.just(f"a {EOS}<|padding|> b"))
def test_any_text_comes_back_exactly(text):
    assert BPE.decode(encode(text)) == text


def test_spelled_special_tokens_are_ordinary_text():
    assert BPE.eos_token_id not in encode(f"one{EOS}two")


@given(st.text(alphabet="abTo \n\t'.1é", max_size=80), st.integers(1, 20))
def test_pieces_join_to_the_text(text, limit):
    cut = list(pieces(text, limit))
    assert "".join(cut) == text
    assert all(len(piece) <= limit for piece in cut)


@given(
    st.lists(
        st.sampled_from(["be", "to", "'tis", "1603", "—", "Être", ".", " ", "\n", "\n\n", "\t", "  \n "]), max_size=60
    )
)
def test_pieces_have_the_ids_of_the_whole_text(parts):
    text = " ".join(parts)
    whole = BPE(text, add_special_tokens=False)["input_ids"]
    in_pieces = BPE(list(pieces(text, limit=16)), add_special_tokens=False)["input_ids"]
    assert list(chain.from_iterable(in_pieces)) == whole


@given(st.lists(st.text(alphabet="ab \n", max_size=50), min_size=1, max_size=8))
def test_each_document_ends_once(texts):
    assert sum(ends for _, ends in encode_documents(BPE, texts)) == len(texts)


def test_special_tokens_survive_saving(tmp_path):
    BPE.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token_id, again.bos_token_id, again.unk_token_id, again.pad_token_id) == (0, 0, 0, 1)
    assert again(TEXT)["input_ids"] == BPE(TEXT)["input_ids"]
    assert load_tokenizer(str(tmp_path)).decode(encode(TEXT)) == TEXT


def test_training_is_deterministic():
    assert train_bpe([TEXT], 300).get_vocab() == BPE.get_vocab()


@pytest.mark.parametrize("vocab_size", [1, 256, 258])
def test_vocabulary_without_room_for_a_merge(vocab_size):
    with pytest.raises(UserError, match="more than 258"):
        train_bpe([TEXT], vocab_size)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0"}'),
    ],
)
def test_damaged_tokenizer(tmp_path, file, content):
    BPE.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match="damaged tokenizer"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_eos(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        tmp_path
    )
    assert "eos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
