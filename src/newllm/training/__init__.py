"""Training on the Hugging Face Trainer, exact to resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newllm.training.callbacks import TrainProgress
    from newllm.training.run import TrainResult, check_loggers, new_model, train
    from newllm.training.suitability import check_suitability

MODULES = {
    "callbacks": ["TrainProgress"],
    "run": ["TrainResult", "check_loggers", "new_model", "train"],
    "suitability": ["check_suitability"],
}
__all__ = [
    "TrainProgress",
    "TrainResult",
    "check_loggers",
    "check_suitability",
    "new_model",
    "train",
]


def __getattr__(name: str) -> Any:
    # The Trainer takes 90 MB: a process that measures the memory of steps of Lagged Cache Training does without.
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
