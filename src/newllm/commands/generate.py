"""`newllm generate`: text as it comes, from a prompt, from a pipe, or in conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from newllm.commands.folders import open_model
from newllm.errors import UserError
from newllm.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from newllm.models import TransformerLM

LEAST_TEMPERATURE = 1e-6  # logits divided by much less than this are infinite in float32


@dataclass(kw_only=True)
class GenerateSettings(RunSettings):
    """How text is continued."""

    prompt: str | None = None
    """Text to continue; without it: standard input, or a conversation in a terminal."""
    max_new_tokens: int = 200
    """Tokens to generate."""
    temperature: float = 0.8
    """Below 1 favours likely tokens, above 1 unlikely ones; 0 always takes the likeliest."""
    top_p: float = 0.95
    """Draw only from the likeliest tokens that together have this probability."""


def generate(settings: GenerateSettings) -> None:
    """Continues the prompt on standard output. settings.model is a run folder, a model folder or a preset.

    Raises:
        UserError: no such model, an empty prompt, or a value out of range.
    """
    check_sampling(settings)
    in_conversation = settings.prompt is None and sys.stdin.isatty()
    prompt = None if in_conversation else read_prompt(settings.prompt)
    model, tokenizer = open_model(settings)
    if prompt is not None:
        continue_text(model, tokenizer, prompt, settings, sys.stdout)
        return
    print("Type the beginning of a text; an empty line ends.", file=sys.stderr)
    while prompt := ask("> "):
        continue_text(model, tokenizer, prompt, settings, sys.stdout)


def check_sampling(settings: GenerateSettings) -> None:
    """Raises UserError for a value out of range."""
    if settings.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {settings.max_new_tokens}: it must be at least 1")
    if settings.temperature < LEAST_TEMPERATURE and settings.temperature != 0:
        raise UserError(
            f"--temperature is {settings.temperature}: it must be at least {LEAST_TEMPERATURE}, or 0 for always the "
            "likeliest token"
        )
    if not 0 < settings.top_p <= 1:
        raise UserError(f"--top-p is {settings.top_p}: it must lie in (0, 1]")


def read_prompt(prompt: str | None) -> str:
    """The given prompt, or all of standard input as a text file is read, without its last newline."""
    if prompt is None:
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
    if not prompt:
        raise UserError("the prompt is empty: give --prompt TEXT, or text on standard input")
    return prompt


def ask(question: str) -> str:
    """A line from the terminal; empty at its end (Ctrl-D)."""
    try:
        return input(question)
    except EOFError:
        print()
        return ""


def continue_text(
    model: TransformerLM, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: GenerateSettings, out: TextIO
) -> None:
    """Writes the prompt and its continuation, every character as soon as it is complete."""
    import torch
    import transformers
    from tokenizers.decoders import DecodeStream
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        """Receives the prompt (1, T) and then each new token (1,); a character may span several tokens."""

        def __init__(self) -> None:
            self.stream = DecodeStream(skip_special_tokens=True)

        def put(self, value: torch.Tensor) -> None:
            for token in value.flatten().tolist():
                out.write(self.stream.step(tokenizer.backend_tokenizer, token) or "")
            out.flush()

        def end(self) -> None:
            out.write("\n")
            out.flush()

    transformers.set_seed(settings.seed)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)], device=model.device)
    sampling = (
        {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
    )
    model.generate(  # type: ignore[misc]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=settings.max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        streamer=Streamer(),
        **sampling,  # type: ignore[arg-type]
    )
