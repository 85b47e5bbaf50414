"""Text in, token files out: corpora, splits, tokenizers, windows."""

from newllm.data.preparation import PreparedData, describe, prepare, sample_text
from newllm.data.tokens import TokenFile

__all__ = ["PreparedData", "TokenFile", "describe", "prepare", "sample_text"]
