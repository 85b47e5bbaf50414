"""`newllm memory absorb|show|ask` as a user meets them."""

import errno
import io
import json
import os
import re
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers

from newllm import cli, create_model, load_model
from newllm.commands import memory as command
from newllm.commands.memory import AbsorbSettings, encode
from newllm.data.hub import load_tokenizer
from newllm.data.tokenizer import train_bpe
from newllm.models.memory_file import load_memory, read_memory, save_memory

WINDOW, SEGMENT = 12, 8
BOOK = "The naïve café keeps the river – and “words” 字 follow words, one after another.\r\n" * 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run folder with an untrained model of one memory, a model folder without memory, and texts."""
    transformers.logging.set_verbosity_error()  # as in a process of its own
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("memory")
    tokenizer = train_bpe([BOOK], 300)
    for name in ("infini", "pythia"):
        torch.manual_seed(0)
        options = {"segment_length": SEGMENT} if name == "infini" else {}
        shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 16}
        model = create_model(name, **shape, vocab_size=len(tokenizer), initializer_range=0.3, **options)
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
    (folder / "infini" / "config.yaml").write_text(f"seq_length: {WINDOW}\n")
    (folder / "book.txt").write_bytes(BOOK.encode("utf-8-sig"))
    return folder


@pytest.fixture(scope="module")
def memory(place) -> Path:
    """book.txt, absorbed."""
    out = place / "book.memory"
    assert cli.main(["memory", "absorb", str(place / "infini"), str(place / "book.txt"), "--out", str(out)]) == 0
    return out


def run(*argv: object) -> int:
    return cli.main(["memory", *map(str, argv)])


def book_ids(place: Path) -> list[int]:
    return encode(load_tokenizer(str(place / "infini" / "model")), BOOK.replace("\r\n", "\n"))


def test_absorbing_reads_window_by_window(place, memory):
    file, state = read_memory(memory)
    ids = book_ids(place)
    assert (file.tokens_read, file.sources) == (len(ids), ["book.txt"])
    model = load_model(place / "infini").eval()
    for start in range(0, len(ids), WINDOW):
        with torch.no_grad():
            model(torch.tensor([ids[start : start + WINDOW]]), update_memory=True)
    expected = model.get_memory_state()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_path_may_begin_with_the_home_folder(place, memory, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    assert run("absorb", "~/infini", "~/book.txt", "--out=~/home.memory") == 0
    assert run("absorb", "~/infini", "~/book.txt", "--into=~/home.memory") == 0
    assert run("show", "~/home.memory", "--model=~/infini") == 0
    assert read_memory("~/home.memory")[0].tokens_read == 2 * read_memory(memory)[0].tokens_read


def test_it_tells_what_was_read(place, tmp_path, capsys):
    assert run("absorb", place / "infini", place / "book.txt", "--out", tmp_path / "a.memory", "--window", 16) == 0
    out = capsys.readouterr().out
    tokens = len(book_ids(place))
    segments = 2 * (tokens // 16) + -(-(tokens % 16) // SEGMENT)
    assert re.search(rf"read {tokens} tokens in [\d.]+ s \([\d,]+ tokens/s\), {segments} segments in all", out)
    assert f"a.memory, {1 * (16 * 16 + 16) * 4 + 8:,} bytes for {tokens} tokens" in out


def test_text_from_a_pipe_goes_on_in_the_same_file(place, memory, tmp_path, monkeypatch):
    path = tmp_path / "a.memory"
    path.write_bytes(memory.read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The river keeps the words.")))
    assert run("absorb", place / "infini", "-", "--into", path) == 0
    file, state = read_memory(path)
    assert file.sources == ["book.txt", "standard input"]
    assert file.tokens_read > len(book_ids(place))
    assert int(state["0.written"]) > int(read_memory(memory)[1]["0.written"])


def test_going_on_into_another_file_leaves_the_first(place, memory, tmp_path):
    before = memory.read_bytes()
    argv = ("absorb", place / "infini", place / "book.txt", "--into", memory, "--out", tmp_path / "b.memory")
    assert run(*argv) == 0
    assert memory.read_bytes() == before
    assert read_memory(tmp_path / "b.memory")[0].tokens_read == 2 * len(book_ids(place))


@pytest.mark.parametrize("window", [[], ["--window", "6"]])
def test_an_interruption_keeps_what_was_read_and_says_how_to_go_on(place, tmp_path, monkeypatch, capsys, window):
    path, whole = tmp_path / "a.memory", tmp_path / "whole.memory"
    assert run("absorb", place / "infini", place / "book.txt", "--out", whole, *window) == 0

    @contextmanager
    def interrupting(total):
        yield lambda read: signal.raise_signal(signal.SIGINT) if read == 3 * WINDOW else None

    monkeypatch.setattr(command, "progress", interrupting)
    assert run("absorb", place / "infini", place / "book.txt", "--out", path, *window) == 130
    assert read_memory(path)[0].tokens_read == 3 * WINDOW
    how = re.search(r"to go on: (.+)", capsys.readouterr().err)
    monkeypatch.undo()
    assert run("absorb", place / "infini", place / "book.txt", *how[1].split()) == 0
    (file, state), (expected_file, expected) = read_memory(path), read_memory(whole)
    assert file == expected_file
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_an_interruption_before_the_first_window_writes_nothing(place, tmp_path, monkeypatch, capsys):
    @contextmanager
    def interrupting(total):
        signal.raise_signal(signal.SIGINT)
        yield lambda read: None

    monkeypatch.setattr(command, "progress", interrupting)
    assert run("absorb", place / "infini", place / "book.txt", "--out", tmp_path / "a.memory") == 130
    assert "nothing was read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_show(place, memory, capsys):
    assert run("show", memory) == 0
    *table, line = capsys.readouterr().out.splitlines()
    shown = json.loads(line)
    assert shown["tokens_read"] == len(book_ids(place))
    assert shown["layers"][0]["type"] == "infini"
    assert "gates" not in shown["layers"][0]
    text = "\n".join(table)
    for part in ("book.txt", "infini, pythia; D 16", shown["model"], "1 memory of 1 × 16 × 16 numbers"):
        assert part in text


def test_show_with_the_model_has_its_gates(place, memory, capsys):
    assert run("show", memory, "--model", place / "infini") == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["layers"][0]["gates"] == [0.5]
    assert "weight of what is read from the memory: 0.5" in "\n".join(table)


def asked(place, memory, capsys, *flags: object) -> str:
    capsys.readouterr()
    argv = ("ask", place / "infini", memory, "--prompt", "The naïve café", "--max-new-tokens", 12, *flags)
    assert run(*argv) == 0
    return capsys.readouterr().out


def test_ask_continues_with_and_without_the_memory(place, memory, capsys):
    out = asked(place, memory, capsys, "--temperature", 0)
    with_memory, without = re.findall(r"^The naïve café.*$", out, re.MULTILINE)
    assert with_memory != without
    assert (
        cli.main(
            [
                "generate",
                str(place / "infini"),
                *["--max-new-tokens", "12", "--temperature", "0"],
                "--prompt",
                "The naïve café",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == without + "\n"


def test_ask_uses_the_same_seed_for_both(place, memory, capsys):
    out = asked(place, memory, capsys, "--seed", 3)
    assert out == asked(place, memory, capsys, "--seed", 3)
    assert out != asked(place, memory, capsys, "--seed", 4)


def test_ask_tells_the_gain_in_log_probability(place, memory, capsys):
    out = asked(place, memory, capsys)
    model, tokenizer = load_model(place / "infini").eval(), load_tokenizer(str(place / "infini" / "model"))
    ids = torch.tensor([tokenizer.encode("The naïve café", add_special_tokens=False)])
    with torch.no_grad():
        without = model.token_losses(ids)
        load_memory(model, memory)
        gain = float((without - model.token_losses(ids)).mean())
    assert f"{gain:+.4f} nats a token over {ids.shape[1] - 1} tokens" in out


def test_ask_with_a_prompt_of_one_token(place, memory, capsys):
    assert run("ask", place / "infini", memory, "--prompt", "T", "--max-new-tokens", 2) == 0
    assert "single token" in capsys.readouterr().out


def wrong(capsys, fragment: str, *argv: object) -> None:
    capsys.readouterr()
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("newllm: error: ")
    assert fragment in line


def test_wrong_input_to_absorb(place, memory, tmp_path, capsys):
    infini, book, out = place / "infini", place / "book.txt", ("--out", tmp_path / "a.memory")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    wrong(capsys, "--out is missing", "absorb", infini, book)
    wrong(capsys, "is there already", "absorb", infini, book, "--out", memory)
    wrong(capsys, "is a folder: name a file, for example --out", "absorb", infini, book, "--out", tmp_path / "folder")
    wrong(capsys, "is a file: give the folder of a trained model", "ask", book, book, "--prompt", "a")
    wrong(capsys, "no folder", "absorb", infini, book, "--out", tmp_path / "none" / "a.memory")
    wrong(capsys, "no such folder; give the folder of a trained model", "absorb", "infini", book, *out)
    wrong(capsys, "no model in", "absorb", tmp_path / "folder", book, *out)
    wrong(capsys, "pythia: this model has no memory layer; presets", "absorb", place / "pythia", book, *out)
    wrong(capsys, "give --window N", "absorb", infini / "model", book, *out)
    wrong(capsys, "no such file", "absorb", infini, tmp_path / "none.txt", *out)
    wrong(capsys, "is a directory", "absorb", infini, tmp_path / "folder", *out)
    wrong(capsys, "no text in it", "absorb", infini, tmp_path / "empty.txt", *out)
    wrong(capsys, "not UTF-8 text (byte 3)", "absorb", infini, tmp_path / "latin.txt", *out)
    wrong(capsys, "--window is 0", "absorb", infini, book, *out, "--window", 0)
    wrong(capsys, "--skip 9999 leaves nothing", "absorb", infini, book, *out, "--skip", 9999)
    wrong(capsys, "no such memory file", "absorb", infini, book, "--into", tmp_path / "none.memory")
    wrong(capsys, "not a memory file", "absorb", infini, book, "--into", tmp_path / "latin.txt")
    assert not (tmp_path / "a.memory").exists()


def test_standard_input_is_called_by_its_name(place, tmp_path, monkeypatch, capsys):
    for content, what in ((b" ", "no text in it"), (b"\xff", "not UTF-8 text (byte 0)")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        wrong(capsys, f"error: standard input: {what}", "absorb", place / "infini", "-", "--out", tmp_path / "a")


def test_a_text_whose_name_is_no_text_is_told_by_its_bytes(place, tmp_path):
    book = tmp_path / "caf\udce9.txt"
    try:
        book.write_text(BOOK)
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    assert run("absorb", place / "infini", book, "--out", tmp_path / "out") == 0
    assert read_memory(tmp_path / "out")[0].sources == [r"caf\xe9.txt"]


def test_wrong_input_to_show_and_ask(place, memory, tmp_path, capsys):
    infini, prompt = place / "infini", ("--prompt", "The")
    wrong(capsys, "no such memory file", "show", tmp_path / "none.memory")
    wrong(capsys, "not a memory file", "show", place / "book.txt")
    wrong(capsys, "no memory layer", "show", memory, "--model", place / "pythia")
    wrong(capsys, "the prompt is empty", "ask", infini, memory, "--prompt", "")
    wrong(capsys, "--temperature is -1.0", "ask", infini, memory, *prompt, "--temperature", -1)
    other = load_model(infini).eval()
    with torch.no_grad():
        other.head.weight[0, 0] += 1
        other(torch.ones(2, 9, dtype=torch.long), update_memory=True)
        save_memory(other, tmp_path / "other.memory", tokens_read=9)
        own = load_model(infini).eval()
        own(torch.ones(2, 9, dtype=torch.long), update_memory=True)
        save_memory(own, tmp_path / "rows.memory", tokens_read=18)
    wrong(capsys, "this memory belongs to model", "ask", infini, tmp_path / "other.memory", *prompt)
    wrong(capsys, "memories of 2 rows", "ask", infini, tmp_path / "rows.memory", *prompt)


def test_ask_in_a_terminal_needs_a_prompt(place, memory, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    wrong(capsys, "--prompt is missing", "ask", place / "infini", memory)


def test_a_full_disk(place, tmp_path, monkeypatch, capsys):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    argv = ("absorb", place / "infini", place / "book.txt", "--out", tmp_path / "a.memory")
    wrong(capsys, "No space left on device", *argv)
    assert not list(tmp_path.iterdir())


def test_what_was_read_is_not_lost_with_a_full_disk(place, tmp_path, monkeypatch, capsys):
    written = Path.write_bytes

    def full(self, content):
        if self.is_relative_to(tmp_path / "full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(self, content)

    (tmp_path / "full").mkdir()
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    capsys.readouterr()
    assert run("absorb", place / "infini", place / "book.txt", "--out", tmp_path / "full" / "a.memory") == 2
    (line,) = capsys.readouterr().err.splitlines()
    rescued = Path(line.rpartition(" ")[2])
    assert "No space left on device; the memory is in" in line
    assert run("show", rescued, "--model", place / "infini") == 0


def test_settings_are_printed_as_a_config(place, capsys):
    assert run("absorb", place / "infini", "a.txt", "--out", "a.memory", "--window", 64, "--print_config") == 0
    out = capsys.readouterr().out
    assert "\nwindow: 64\n" in out
    assert set(re.findall(r"^(\w+):", out, re.MULTILINE)) == set(vars(AbsorbSettings()))
