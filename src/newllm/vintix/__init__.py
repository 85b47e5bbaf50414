"""Vintix: an action model that learns inside its context (in-context reinforcement learning, arXiv 2501.19400).

`collect` writes learning histories of many tasks, `train` fits one model to all of them, `evaluate` puts it before
tasks it has never seen. Nothing here imports torch, gymnasium or h5py before a command needs it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from newllm.errors import UserError


def require(module: str) -> ModuleType:
    """A module of the optional extra. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"newllm vintix needs {error.name or module}, which is not installed: in the folder of New-LLM, "
            "pip install -e '.[vintix]' -c constraints.txt"
        ) from None
