"""Lagged Cache Training (SYSTEMS §9): a recurrence trained in parallel.

The state that a recurrent model is given at token t is its own after token t − 1. Instead of computing T states one
after the other, a step takes those that the window had when it was last trained on, and moves them on by one token: one
parallel pass gives the loss, and new states, which are kept for the next time. The first time, a discrete pass gives
states to begin with.

A kept state is as old as an epoch and carries no gradient. So a step may take more passes, each with the states of the
one before, and gradient may flow through the last of them; T passes are the true recurrence, gradient included.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from newllm.models.recurrent import RecurrentLM, lag
from newllm.settings import RunSettings
from newllm.training.lagged_store import LaggedCache, lagged_cache

NOT_KEPT = -1  # the sample of a window that is never seen again
GOLDEN = (5**0.5 - 1) / 2


def lagged_loss(
    model: RecurrentLM,
    input_ids: Tensor,
    labels: Tensor,
    states: Tensor,
    passes: int,
    grad_passes: int,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss after some parallel passes over a batch without padding.

    Args:
        input_ids, labels: (B, T); labels and num_items_in_batch as of `TransformerLM.forward`.
        states: (B, T, N), at token t a state after it, to begin with.
        passes: k, each with the states of the one before.
        grad_passes: so many of the last ones carry gradient, back through each other's states.

    Returns:
        loss of the last pass; its states (B, T, N), detached; residual ‖s^k − s^(k−1)‖ / ‖s^k‖ of the whole batch, ().
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    before = states
    for number in range(passes - 1):
        with torch.set_grad_enabled(number >= passes - grad_passes):
            before = model.next_states(input_ids, lag(before), positions=positions)
    hidden, states = model.iterate(input_ids, lag(before), positions=positions)
    states = states.detach()
    change = torch.linalg.vector_norm(states.float() - before.detach().float())
    residual = change / torch.linalg.vector_norm(states.float()).clamp(min=torch.finfo(torch.float32).tiny)
    return model.loss_of(hidden, labels, num_items_in_batch), states, residual


class LaggedTraining:
    """What the trainer does in place of the model's forward, for a model that feeds a state back.

    The windows it gets come from `KeyedWindows`.
    """

    def __init__(self, model: RecurrentLM, settings: RunSettings, num_samples: int, folder: Path) -> None:
        """num_samples: windows of the text. folder: where a file for their states may be made."""
        assert settings.seq_length is not None
        self.model, self.settings = model, settings
        self.cache: LaggedCache = lagged_cache(
            num_samples, settings.seq_length, model.state_size, folder, settings.lagged_memory
        )
        self.residuals: list[float] = []

    def loss(self, inputs: dict[str, Tensor], step: int, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The loss of a micro-batch {"input_ids", "labels", "sample"} in optimizer step `step`, counted from 0."""
        input_ids, samples = inputs["input_ids"], inputs["sample"].cpu()
        settings = self.settings
        passes, grad_passes = settings.lagged_passes, settings.lagged_grad_passes
        if is_deep(step, settings.lagged_deep_share):
            passes = grad_passes = settings.lagged_deep_passes
        states = self._states_before(input_ids, samples)
        loss, states, residual = lagged_loss(
            self.model, input_ids, inputs["labels"], states, passes, grad_passes, num_items_in_batch
        )
        self.cache.write(samples, states)
        self.residuals.append(residual.item())
        return loss

    @torch.no_grad()
    def _states_before(self, input_ids: Tensor, samples: Tensor) -> Tensor:
        """(B, T, N): the kept states; of windows that are new, those of a discrete pass."""
        known = self.cache.knows(samples)
        kept = self.cache.read(samples[known]).to(self.model.device, self.model.dtype)
        if known.all():
            return kept
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        states = self.model.first_states(input_ids, positions).to(self.model.dtype)
        if known.any():
            states[known.to(states.device)] = kept
        return states

    def take_residual(self) -> float:
        """Mean over the micro-batches since the last call."""
        mean = sum(self.residuals) / len(self.residuals)
        self.residuals.clear()
        return mean


def is_deep(step: int, share: float) -> bool:
    """Whether a step, counted from 0, takes more passes: `share` of all steps do, spread over the run.

    Not at equal distances: tasks take every so-manyth step too, and all deeper steps could be theirs. Multiples of the
    golden ratio keep step with no fraction, and the steps of the text and of each task get their share.
    """
    return step * GOLDEN % 1 < share


class KeyedWindows(Dataset[dict[str, Tensor]]):
    """Training windows that tell which one they are, under "sample".

    A window of a task (`data.tasks.WithTasks`) is seen only once: there is no use in keeping its states, and each time
    it begins with a discrete pass.
    """

    def __init__(self, windows: Dataset[dict[str, Tensor]]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.windows[index]
        rows = item["input_ids"].shape[:-1]  # none, or those of an item that is several windows
        return item | {"sample": torch.full(rows, index if index < len(self) else NOT_KEPT)}
