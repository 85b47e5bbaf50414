"""`newllm memory absorb|show|ask`: a text read into a memory file, what the file holds, what a model makes of it."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from newllm.commands.folders import need_folder, open_model, run_config
from newllm.commands.generate import GenerateSettings, check_sampling, continue_text, read_prompt
from newllm.errors import UserError
from newllm.paths import as_text, user_path
from newllm.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from newllm.models import TransformerLM
    from newllm.models.memory_file import MemoryFile

MOST_TELLING = 5  # tokens of a prompt that `ask` names


@dataclass(kw_only=True)
class AbsorbSettings(RunSettings):
    """What is read, and where the memory goes."""

    out: str | None = None
    """Memory file to write; with --into, that file by default."""
    into: str | None = None
    """Memory file to go on from, instead of an empty memory."""
    window: int | None = None
    """Tokens read at once; attention starts anew with each window, the memory goes on. Default: a training window."""
    skip: int = 0
    """Tokens at the beginning of the text that are not read: to go on after an interruption."""


def absorb(settings: AbsorbSettings, text: str) -> None:
    """Reads a text file ('-': standard input) into a memory file; settings.model is the folder of a trained model.

    Ctrl-C ends the reading after the window, saves what was read, and only then raises KeyboardInterrupt.

    Raises:
        UserError: no such model or text, nothing in it, a model without memory, an existing or impossible --out.
    """
    from newllm.models.memory_file import save_memory

    for name, least in (("window", 1), ("skip", 0)):
        if (value := getattr(settings, name)) is not None and value < least:
            raise UserError(f"--{name} is {value}: it must be at least {least}")
    out = output_file(settings)
    model, tokenizer = open_trained(settings)
    window = settings.window or training_window(user_path(settings.model))
    before = None if settings.into is None else load_one_row(model, settings.into)
    ids = encode(tokenizer, read_text(text))
    if settings.skip >= len(ids):
        raise UserError(f"--skip {settings.skip} leaves nothing of {text}, which has {len(ids):,} tokens")
    if short := short_segments(model, window):
        print(short, flush=True)
    start = time.monotonic()
    read = read_windows(model, ids[settings.skip :], window)
    seconds = time.monotonic() - start
    if read:
        sources = [*(before.sources if before else []), "standard input" if text == "-" else as_text(Path(text).name)]
        tokens = read + (before.tokens_read if before else 0)
        save = partial(save_memory, model, tokens_read=tokens, sources=list(dict.fromkeys(sources)))
        try:
            file = save(out)
        except UserError as error:  # what took hours to read is not lost with a full disk
            rescue = Path(tempfile.mkdtemp(prefix="newllm-")) / out.name
            save(rescue)
            raise UserError(f"{error}; the memory is in {rescue}") from error
        speed = f"{read / max(seconds, 1e-9):,.0f} tokens/s"
        print(f"read {read:,} tokens in {seconds:.1f} s ({speed}), {file.layers[0]['written'][0]:,} segments in all")
        print(f"memory: {out}, {file.bytes:,} bytes for {file.tokens_read:,} tokens")
    if settings.skip + read < len(ids):
        windows = "" if settings.window is None else f" --window {window}"
        rest = f"--into {out} --skip {settings.skip + read}{windows}" if read else "nothing was read"
        print(f"newllm: {len(ids) - settings.skip - read:,} tokens are left; to go on: {rest}", file=sys.stderr)
        raise KeyboardInterrupt


def show(path: str, settings: RunSettings | None) -> None:
    """What a memory file holds, and with the folder of its model also the gates; a JSON line comes last."""
    from newllm.models.memory_file import load_memory, read_memory

    file, gates = read_memory(path)[0], {}
    if settings is not None:
        model, _ = open_trained(settings)
        load_memory(model, path)
        gates = {n: [round(g, 4) for g in layer.gates().tolist()] for n, layer in model.memory_layers().items()}
    print(f"{path}: {file.tokens_read:,} tokens in {file.bytes:,} bytes")
    print(f"  {'read from':12} {', '.join(file.sources) or '—'}")
    print(f"  {'by model':12} {file.about}")
    print(f"  {'fingerprint':12} {file.model}")
    print(f"  {'written by':12} newllm {file.version}")
    for layer in file.layers:
        _, N, Hm, d, _ = layer["shapes"]["matrix"]
        rows = f"{layer['rows']} rows, " if layer["rows"] > 1 else ""
        frozen = f"; frozen: {', '.join(map(str, layer['frozen']))}" if layer["frozen"] else ""
        segments = "/".join(f"{count:,}" for count in layer["written"])
        print(
            f"  {'layer ' + str(layer['index']):12} {layer['type']}: {rows}{N} {'memory' if N == 1 else 'memories'} of "
            f"{Hm} × {d} × {d} numbers, {segments} segments, {layer['bytes']:,} bytes{frozen}"
        )
        if layer["index"] in gates:
            print(f"  {'':12} weight of what is read from the memory: {' '.join(map(str, gates[layer['index']]))}")
    layers = [layer | ({"gates": gates[layer["index"]]} if gates else {}) for layer in file.layers]
    print(json.dumps(asdict(file) | {"bytes": file.bytes, "layers": layers}))


def ask(settings: GenerateSettings, path: str) -> None:
    """Continues a prompt with a memory and, from the same seed, without; and says what the memory knows of it."""
    check_sampling(settings)
    if settings.prompt is None and sys.stdin.isatty():
        raise UserError("--prompt is missing: what is the memory to be asked?")
    prompt = read_prompt(settings.prompt)
    model, tokenizer = open_trained(settings)
    file = load_one_row(model, path)
    with_memory = token_scores(model, tokenizer, prompt)
    print(f"with the memory of {file.tokens_read:,} tokens from {', '.join(file.sources) or path}:", flush=True)
    continue_text(model, tokenizer, prompt, settings, sys.stdout)
    model.reset_memory()
    print("\nwithout it:", flush=True)
    continue_text(model, tokenizer, prompt, settings, sys.stdout)
    print("\n" + comparison(with_memory, token_scores(model, tokenizer, prompt)))


def comparison(with_memory: list[tuple[str, float]], without: list[tuple[str, float]]) -> str:
    """What the memory knows of a prompt: the gain in log-probability, and the tokens where it is largest."""
    if not without:
        return "the prompt is a single token: nothing in it is predicted"
    gains = [(word, a - b) for (word, a), (_, b) in zip(with_memory, without, strict=True)]
    mean = {
        name: sum(score for _, score in scores) / len(scores)
        for name, scores in (("with", with_memory), ("without", without), ("gain", gains))
    }
    telling = sorted(gains, key=lambda pair: -abs(pair[1]))[:MOST_TELLING]
    return (
        f"what the memory knows of this prompt: {mean['gain']:+.4f} nats a token over {len(gains)} tokens "
        f"(log-probability {mean['with']:.4f} with it, {mean['without']:.4f} without; perplexity "
        f"{math.exp(-mean['with']):.2f} and {math.exp(-mean['without']):.2f})\n"
        f"  most at: {', '.join(f'{word!r} {gain:+.2f}' for word, gain in telling)}"
    )


def token_scores(model: TransformerLM, tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, float]]:
    """Every token of a text but the first, with its log-probability in nats."""
    import torch

    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)], device=model.device)
    if ids.shape[1] < 2:
        return []
    with torch.no_grad():
        losses = model.token_losses(ids)[0].tolist()
    words = [str(tokenizer.decode([token])) for token in ids[0, 1:].tolist()]
    return [(word, -loss) for word, loss in zip(words, losses, strict=True)]


def open_trained(settings: RunSettings) -> tuple[TransformerLM, PreTrainedTokenizerBase]:
    """The model of a folder, which must have a memory, and its tokenizer."""
    need_folder(user_path(settings.model))
    model, tokenizer = open_model(settings)
    try:
        model.memory_layers()
    except UserError as error:
        raise UserError(f"{settings.model}: {error}") from None
    return model, tokenizer


def load_one_row(model: TransformerLM, path: str) -> MemoryFile:
    """Gives the model the memory of a file. Raises UserError for one of several rows: a single text reads one."""
    from newllm.models.memory_file import load_memory

    file = load_memory(model, path)
    if (rows := file.layers[0]["rows"]) > 1:
        raise UserError(f"{path}: memories of {rows} rows; take one by newllm.models.memory.take_row, or merge them")
    return file


def short_segments(model: TransformerLM, window: int) -> str:
    """A note where windows do not end with a segment's last token; else empty."""
    lengths = {layer.segment_length for layer in model.memory_layers().values()}
    if all(window % length == 0 for length in lengths):
        return ""
    return (
        f"note: windows of {window} tokens are no multiple of the segments of {', '.join(map(str, sorted(lengths)))} "
        "tokens: each ends with a shorter one, as training never wrote it; --window can be chosen"
    )


def output_file(settings: AbsorbSettings) -> Path:
    """Where the memory goes, checked before anything is read."""
    out = settings.out or settings.into
    if out is None:
        raise UserError("--out is missing: name the memory file to write, for example --out book.memory")
    path = user_path(out)
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: name a file, for example --out {path / 'book.memory'}")
    into = None if settings.into is None else user_path(settings.into)
    if path.exists() and (into is None or not into.exists() or not path.samefile(into)):
        raise UserError(f"--out {path} is there already: choose another name, or go on from it with --into {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path}: no folder {path.parent} that can be written to")
    return path


def training_window(folder: Path) -> int:
    """seq_length of a run folder."""
    window = run_config(folder).get("seq_length")
    if window is None:
        raise UserError(f"{folder} has no config.yaml that tells the length of a training window: give --window N")
    return window


def read_text(name: str) -> str:
    """The text of a file, or of standard input for '-'."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else user_path(name).read_bytes()
        name = "standard input" if name == "-" else name
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not text.strip():
        raise UserError(f"{name}: no text in it")
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids, as training reads them."""
    from newllm.data.tokenizer import encode_documents

    return [token for ids, _ in encode_documents(tokenizer, [text]) for token in ids]


def read_windows(model: TransformerLM, ids: list[int], window: int) -> int:
    """Reads the tokens into the model's memory, window by window; gives how many, fewer after a Ctrl-C."""
    import torch

    read = 0
    with interruptible() as interrupted, progress(len(ids)) as advance, torch.no_grad():
        while read < len(ids) and not interrupted():
            chunk = ids[read : read + window]
            model(torch.tensor([chunk], device=model.device), update_memory=True, logits_to_keep=1)
            read += len(chunk)
            advance(read)
    return read


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one does not wait to be asked for."""
    pressed = False

    def press(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` tokens were read: a bar in a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from newllm.experiments.progress import PLAIN_LINE_SECONDS, duration

    console = Console()
    bar = Progress(BarColumn(20), TextColumn("{task.fields[figures]}"), console=console, transient=True)
    task = bar.add_task("", total=total, figures="")
    start = last_line = time.monotonic()

    def advance(read: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        speed = read / max(now - start, 1e-9)
        figures = f"{read:,} of {total:,} tokens  {speed:,.0f} tokens/s  {duration((total - read) / speed)} left"
        if console.is_terminal:
            bar.update(task, completed=read, figures=figures)
        elif now - last_line >= PLAIN_LINE_SECONDS:
            last_line = now
            console.print(figures, highlight=False, soft_wrap=True)

    with bar if console.is_terminal else nullcontext():
        yield advance
