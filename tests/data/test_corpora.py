import contextlib
import json
import os
import socket
import time
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from newllm.data import hub
from newllm.data.corpora import open_corpus
from newllm.data.tokenizer import load_tokenizer
from newllm.errors import UserError
from newllm.settings import DataSettings

TEXTS = [
    "Once more unto the breach,\ndear friends.",
    "Où sont les neiges d'antan? 漢字 🎭",
    "Or close the wall up\n\nwith our English dead.",
]
LINES = "".join(json.dumps({"text": text, "meta": {"n": 1}}) + "\n" for text in TEXTS).encode()


def read(path, **values):
    return [document.text for document in open_corpus(DataSettings(data=str(path), **values)).documents()]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path, column="text", texts=TEXTS):
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)
    return path


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


@pytest.fixture
def files(tmp_path):
    """One file of each kind, with the same three documents (.txt has the first)."""
    return {
        "txt": write(tmp_path / "a.txt", TEXTS[0].encode()),
        "jsonl": write(tmp_path / "b.jsonl", LINES),
        "jsonl.zst": write(tmp_path / "c.jsonl.zst", zstd(LINES)),
        "parquet": write_parquet(tmp_path / "d.parquet"),
    }


def test_every_kind_of_file(files):
    assert read(files["txt"]) == TEXTS[:1]
    for kind in ("jsonl", "jsonl.zst", "parquet"):
        assert read(files[kind]) == TEXTS


def test_folder_is_read_recursively_in_order(files, tmp_path):
    write(tmp_path / "below" / "e.txt", b"deeper")
    write(tmp_path / ".hidden" / "f.txt", b"hidden")
    write(tmp_path / "notes.md", b"not read")
    assert read(tmp_path) == [TEXTS[0], *TEXTS, "deeper", *TEXTS, *TEXTS]


def test_file_names_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "~notes.txt", b"one")
    assert read("~notes.txt") == ["one"]
    folder = tmp_path / "letters"
    folder.mkdir()
    write(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")), b"two")
    assert read(folder) == ["two"]


def test_zst_of_several_frames_and_no_last_newline(tmp_path):
    middle = len(LINES) // 2
    path = write(tmp_path / "x.jsonl.zst", zstd(LINES[:middle]) + zstd(LINES[middle:].rstrip()))
    assert read(path) == TEXTS


def test_windows_files(tmp_path):
    assert read(write(tmp_path / "x.txt", "\ufeffa\r\n\r\nb".encode())) == ["a\n\nb"]


def test_blank_and_null_texts_are_left_out(tmp_path):
    assert read(write(tmp_path / "x.jsonl", b'{"text": " "}\n\n{"text": null}\n{"text": "a"}\n')) == ["a"]


def test_other_text_field_and_fewer_documents(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", column="content")
    assert read(path, text_field="content", max_documents=2) == TEXTS[:2]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_local_folder_in_the_layout_of_the_hub(files, tmp_path, kind):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    files[kind].rename(folder / f"train-00000.{kind}")
    files["txt"].unlink()
    write_parquet(folder / "test-00000.parquet", texts=["other split"]) if kind == "parquet" else write(
        folder / "test-00000.jsonl", b'{"text": "other split"}\n'
    )
    assert read(f"hf:{tmp_path / 'hub'}") == TEXTS


BAD_INPUT = {
    "missing path": ("no/such/file.txt", None, "no such file or folder"),
    "misspelt name": ("shakespear", None, "did you mean 'shakespeare'"),
    "unknown name": ("xyzzy", None, "valid: .*pile"),
    "empty name": ("", None, "names nothing"),
    "empty name on the hub": ("hf:", None, "names nothing"),
    "unknown kind": ("x.pdf", b"%PDF", r"supported: \.txt"),
    "not utf-8": ("x.txt", "é".encode("latin-1"), "not UTF-8 text"),
    "jsonl not utf-8": ("x.jsonl", b'{"text": "\xe9"}', "line 1: not UTF-8"),
    "invalid json": ("x.jsonl", LINES + b'{"text": \n', "line 4: not valid JSON"),
    "no object": ("x.jsonl", b"[1]\n", "JSON object"),
    "no such field": ("x.jsonl", b'{"content": "a", "id": 1}\n', "no field 'text'; fields: content, id"),
    "not text": ("x.jsonl", b'{"text": 7}\n', "holds int, not text"),
    "truncated zst": ("x.jsonl.zst", zstd(LINES)[:-9], "truncated zstd"),
    "damaged zst": ("x.jsonl.zst", b"not zstd at all", "damaged zstd"),
    "broken parquet": ("x.parquet", b"PAR1 and no more", "not a readable parquet"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(tmp_path, case):
    name, content, message = BAD_INPUT[case]
    path = name if content is None else write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert content is None or name in str(caught.value)


def test_missing_parquet_column_names_the_others(tmp_path):
    with pytest.raises(UserError, match="no column 'text'; columns: content"):
        read(write_parquet(tmp_path / "x.parquet", column="content"))


def test_folder_without_supported_files(tmp_path):
    with pytest.raises(UserError, match="no file in this folder ends in"):
        read(tmp_path)


def test_no_documents_asked_for(files):
    with pytest.raises(UserError, match="--max-documents is 0"):
        read(files["txt"], max_documents=0)


@pytest.fixture(params=["offline", "refused", "silent"])
def no_network(request, monkeypatch, tmp_path):
    """A hub that is switched off, refuses the connection, or takes it and never answers."""
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.5)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        if request.param == "refused":
            server.close()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", request.param == "offline")
        yield


@pytest.mark.parametrize("data", ["pile", "hf:some/texts", "hf:some/texts:config"])
def test_hub_without_network_says_so_quickly(no_network, data):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot reach the Hugging Face hub .*--data shakespeare"):
        read(data)
    assert time.monotonic() - start < 5


def test_tokenizer_without_network_says_so(no_network):
    with pytest.raises(UserError, match=r"cannot reach the Hugging Face hub .*--tokenizer bpe"):
        load_tokenizer("no-such-org/no-such-tokenizer")
