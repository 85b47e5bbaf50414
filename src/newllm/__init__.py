"""New-LLM: language models that remember cheaply, compared on the same text under the same budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from newllm.models import TransformerLM, create_model, load_model

__version__ = "0.1.0"
__all__ = ["TransformerLM", "create_model", "load_model"]


def __getattr__(name: str):
    # torch and transformers take seconds to import: only when a model is asked for.
    if name in __all__:
        from newllm import models

        return getattr(models, name)
    raise AttributeError(f"module 'newllm' has no attribute '{name}'")
