"""What layers remember between calls: one class per kind of state, collected in a Hugging Face cache.

State belongs to rows: its tensors have the batch as their first dimension, and it can be reordered, repeated, selected,
reset row by row, measured from its live tensors, exported and restored.
"""

from newllm.models.cache.combined import CombinedState
from newllm.models.cache.lm import LMCache, adopt
from newllm.models.cache.memory import MemoryState, memory_of
from newllm.models.cache.state import PRECISIONS, LayerState, RecurrentState, bytes_of, check_precision
from newllm.models.cache.tokens import KeyValueState, LatentState, TokenState

__all__ = [
    "PRECISIONS",
    "CombinedState",
    "KeyValueState",
    "LMCache",
    "LatentState",
    "LayerState",
    "MemoryState",
    "RecurrentState",
    "TokenState",
    "adopt",
    "bytes_of",
    "check_precision",
    "memory_of",
]
