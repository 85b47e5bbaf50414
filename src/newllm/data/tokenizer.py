"""Tokenizers: a byte-level BPE trained here, or any Hugging Face tokenizer.

Byte-level: every text has an encoding, and decoding gives exactly that text back. There is no unknown token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from newllm.data import hub
from newllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_VOCAB = 256 + 2
"""Every byte, EOS and padding."""
LARGEST_VOCAB = 2**20
"""The trainer takes memory for all of them before it reads a word."""
PIECE_CHARACTERS = 1 << 15
BATCH_CHARACTERS = 1 << 20


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError for a vocabulary that leaves no room for a single merge, or that no text can fill."""
    if vocab_size <= SMALLEST_VOCAB:
        raise UserError(
            f"--vocab-size is {vocab_size}: a byte-level BPE needs more than {SMALLEST_VOCAB} "
            f"(256 bytes, {EOS} and {PADDING})"
        )
    if vocab_size > LARGEST_VOCAB:
        raise UserError(f"--vocab-size is {vocab_size}: it must be at most {LARGEST_VOCAB}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` words (fewer where the text has no more pairs to merge).

    EOS is id 0 and also BOS and unknown, padding is id 1, as in Pythia's tokenizer.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=EOS,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A ready tokenizer by folder or name on the hub. Raises UserError where there is none, or it has no EOS token."""
    tokenizer = hub.load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--tokenizer {name} has no end-of-text token, which must separate documents; choose one that has"
        )
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[tuple[list[int], bool]]:
    """Token ids piece by piece, each with whether it ends its document; no special tokens are added.

    Memory is bounded by one document of text plus a batch of pieces. A text that spells a special token, such as
    "<|endoftext|>", is encoded as ordinary characters, so that it cannot end a document.
    """
    batch: list[tuple[str, bool]] = []
    size = 0

    def encode() -> Iterator[tuple[list[int], bool]]:
        encoded = tokenizer(
            [piece for piece, _ in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        yield from zip(encoded["input_ids"], (ends for _, ends in batch), strict=True)

    for text in texts:
        document = list(pieces(text))
        for index, piece in enumerate(document):
            batch.append((piece, index == len(document) - 1))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield from encode()
                batch, size = [], 0
    if batch:
        yield from encode()


def pieces(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The text in pieces of at most `limit` characters, cut before a newline, else before any space, else anywhere.

    GPT-2's pre-tokenizer (the one of `train_bpe` and of Pythia) starts a new word at a space or newline followed by
    something visible, whatever comes before: cut there, the pieces give the same ids as the whole text. Tokenizers that
    add a space at the start of a text see one at each cut.
    """
    start = 0
    while len(text) - start > limit:
        end = _word_start(text, start + 1, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _word_start(text: str, low: int, high: int) -> int:
    """The last position in [low, high] of a newline, else a space, followed by something visible; else `high`."""
    for separator in "\n ":
        position = high + 1
        while (position := text.rfind(separator, low, position)) >= 0:
            if not text[position + 1 : position + 2].isspace():
                return position
    return high
