"""How a model reads whenever something is measured of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from newllm.devices import autocast, resolve_precision
from newllm.settings import Precision

if TYPE_CHECKING:
    from newllm.models import TransformerLM


@contextlib.contextmanager
def as_measured(model: TransformerLM, precision: Precision) -> Iterator[None]:
    """In evaluation mode, without gradient, in the precision of the run; then in the mode it was in before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(model.device, resolve_precision(precision, model.device)):
            yield
    finally:
        model.train(was_training)
