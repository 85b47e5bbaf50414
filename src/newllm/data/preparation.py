"""From settings to prepared data: corpus, splits, tokenizer, token files, all cached under one fingerprint.

A preparation is made in a temporary folder and renamed into place when it is complete, so that neither an interruption
nor a second process at the same time can leave half of one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.data import hub
from newllm.data.corpora import Corpus, open_corpus
from newllm.data.overlap import NGRAM_WORDS, overlap_shares
from newllm.data.splits import SPLITS, Spool, split_documents
from newllm.data.tokenizer import check_vocab_size, load_tokenizer, train_bpe
from newllm.data.tokens import TokenFile, read_tokens, write_tokens
from newllm.errors import UserError
from newllm.paths import cache_folder
from newllm.resolution import load_scale
from newllm.settings import PILE_TOKENIZER, DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Raised whenever the same settings would give other tokens than before: caches made before are then not used."""
INFO_FILE = "info.json"
SIZES_FILE = "sizes.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),
)
"""Files of a folder that make its tokenizer; weights may stand beside them."""


@dataclass
class PreparedData:
    """Everything training and evaluation need to know of a text."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_dir: Path
    splits: dict[str, TokenFile]
    """'train', 'validation' and 'test'."""
    info: dict[str, Any]
    """What a report says about the data; JSON."""
    fingerprint: str


def prepare(settings: DataSettings, progress: Callable[[str], None] | None = None) -> PreparedData:
    """The data of the settings, from the cache or made now.

    Raises:
        UserError: input nothing can be made of, no network where one is needed, a cache folder that cannot be written,
            or a split shorter than one window of `settings.seq_length` tokens.
    """
    say = progress or (lambda message: None)
    tokenizer_name, vocab_size = _tokenizer_choice(settings)
    corpus = open_corpus(settings)
    fingerprint = _fingerprint(settings, corpus, tokenizer_name, vocab_size)
    cache = cache_folder(settings.cache_dir)
    folder = cache / fingerprint
    if not _complete(folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{fingerprint}-", dir=cache) as temporary:
                made = Path(temporary) / "made"
                _make(made, settings, corpus, tokenizer_name, vocab_size, say)
                _publish(made, folder)
        except OSError as error:
            raise UserError(
                f"cannot write the prepared data to {cache}: {error.strerror or error}; "
                "make room there or choose another folder with --cache-dir or $NEWLLM_CACHE"
            ) from error
    data = load_prepared(folder)
    _check_length(data, settings)
    return data


def _tokenizer_choice(settings: DataSettings) -> tuple[str, int]:
    """Name of the tokenizer, and size of its vocabulary (0 with a ready tokenizer)."""
    name = settings.tokenizer or (PILE_TOKENIZER if settings.data == "pile" else "bpe")
    if name != "bpe":
        return name, 0
    vocab_size = settings.vocab_size or load_scale("quickstart")["vocab_size"]
    check_vocab_size(vocab_size)
    return name, vocab_size


def _fingerprint(settings: DataSettings, corpus: Corpus, tokenizer_name: str, vocab_size: int) -> str:
    """Hash of everything the token files depend on."""
    parts: list[Any] = [VERSION, corpus.name, corpus.identity, settings.text_field, settings.max_documents, vocab_size]
    if corpus.fixed_split is None:
        parts += [settings.validation_share, settings.test_share]
    folder = hub.local_folder(tokenizer_name)
    files = [tokenizer_name] if folder is None else _tokenizer_files(folder)
    parts += [file if isinstance(file, str) else hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})


def _make(
    folder: Path,
    settings: DataSettings,
    corpus: Corpus,
    tokenizer_name: str,
    vocab_size: int,
    say: Callable[[str], None],
) -> None:
    """Writes the tokenizer, the token files and what is known of them into a new folder."""
    folder.mkdir()
    say(f"reading {corpus.name}")
    documents = corpus.documents()
    first = list(itertools.islice(documents, 1))
    # A corpus out of reach is known by now; a wrong tokenizer should be, before all of the corpus is read.
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name != "bpe" else None
    spool = Spool(folder.parent / "texts", itertools.chain(first, documents))
    splits, how = split_documents(spool, corpus, settings.validation_share, settings.test_share)
    for split, extents in splits.items():
        if not extents:
            others = "" if corpus.fixed_split else ", or another --validation-share or --test-share"
            raise UserError(
                f"{corpus.name}: no text is left for the {split} split; more or longer documents are needed{others}"
            )

    def texts(split: str):
        return (document.text for document in spool.read(splits[split]))

    if tokenizer is None:
        say(f"training a byte-level BPE of {vocab_size:,} words")
        tokenizer = train_bpe(texts("train"), vocab_size)
        description = f"byte-level BPE of {len(tokenizer):,} words, trained on the training split"
    else:
        description = f"{tokenizer_name} ({len(tokenizer):,} words)"
    tokenizer.save_pretrained(folder / "tokenizer")
    say("encoding")
    for split in SPLITS:
        write_tokens(folder, split, spool, splits[split], tokenizer)
    say("checking that the splits share no text")
    shares = overlap_shares(texts("train"), {split: texts(split) for split in SPLITS[1:]})
    info = {
        "corpus": corpus.name,
        "split": how,
        "tokenizer": description,
        "vocab_size": len(tokenizer),
        "splits": {split: _counts(read_tokens(folder, split)) for split in SPLITS},
        "overlap": {"ngram_words": NGRAM_WORDS, **shares},
    }
    (folder / INFO_FILE).write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / SIZES_FILE).write_text(json.dumps(sizes))


def _counts(tokens: TokenFile) -> dict[str, float]:
    return {
        "documents": tokens.num_documents,
        "bytes": tokens.num_bytes,
        "tokens": len(tokens),
        "bytes_per_token": round(tokens.num_bytes / max(len(tokens), 1), 4),
    }


def _complete(folder: Path) -> bool:
    """Whether the folder holds every file of a finished preparation, at its full size."""
    try:
        sizes = json.loads((folder / SIZES_FILE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _publish(made: Path, folder: Path) -> None:
    """Moves a finished preparation into place; one that another process finished first is kept."""
    if folder.exists() and not _complete(folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not _complete(folder):
            raise


def load_prepared(folder: Path) -> PreparedData:
    """The data of a finished preparation, by its folder (the parent of `tokenizer_dir`)."""
    tokenizer_dir = folder / "tokenizer"
    return PreparedData(
        tokenizer=hub.load_tokenizer(str(tokenizer_dir)),
        tokenizer_dir=tokenizer_dir,
        splits={split: read_tokens(folder, split) for split in SPLITS},
        info=json.loads((folder / INFO_FILE).read_text(encoding="utf-8")),
        fingerprint=folder.name,
    )


def _check_length(data: PreparedData, settings: DataSettings) -> None:
    counts = {split: len(tokens) for split, tokens in data.splits.items()}
    shortest = min(counts.values())
    if settings.seq_length is not None and shortest < settings.seq_length:
        found = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        valid = (
            f"choose --seq-length {shortest} or less, larger shares, or more text"
            if shortest > 1
            else "more text is needed"
        )
        raise UserError(
            f"{settings.data}: too little text for windows of {settings.seq_length} tokens (tokens: {found}); {valid}"
        )


def describe(data: PreparedData) -> list[tuple[str, str]]:
    """What there is to know about the data, as label and value, for `newllm data show` and reports."""
    info = data.info
    rows = [("corpus", info["corpus"]), ("split", info["split"]), ("tokenizer", info["tokenizer"])]
    for split in SPLITS:
        counts = info["splits"][split]
        documents = f"{counts['documents']:,} document{'' if counts['documents'] == 1 else 's'}"
        size = f"{counts['bytes']:,} bytes, {counts['tokens']:,} tokens ({counts['bytes_per_token']:.2f} bytes a token)"
        rows.append((split, f"{documents}, {size}"))
    for split in SPLITS[1:]:
        share, words = info["overlap"][split], info["overlap"]["ngram_words"]
        found = f"{share:.2%} of its {words}-word sequences occur in train"
        rows.append((f"overlap of {split}", f"not known: it has no {words}-word sequence" if share is None else found))
    return [*rows, ("cached in", str(data.tokenizer_dir.parent))]


def sample_text(data: PreparedData, split: str, tokens: int = 80) -> str:
    """The first `tokens` tokens of a split, as text."""
    return str(data.tokenizer.decode(data.splits[split].ids[:tokens].tolist(), skip_special_tokens=False))
