"""The first phase of a model with a diverse projection (`models/projection.py`): its cell learns alone, without labels.

The training text is one stream, read again and again. In each pass a token's projection is computed from the one that
the pass before has left for the token before it, all tokens of a batch at once: Lagged Cache Training, with batches for
windows and a stream that goes on from one to the next. The phase ends when passes no longer change the projections.
What goes into the cell is the model's own embedding after its LayerNorm, as initialised; only the cell changes.

A checkpoint holds everything at the end of a pass. An interrupted phase goes on from there, and ends bit for bit as it
would have.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor
from torch.nn import functional as F

from newllm.devices import autocast, resolve_device, resolve_precision
from newllm.errors import UserError
from newllm.models.projection import DProjLM, effective_rank, oacd_loss
from newllm.models.recurrent import lag
from newllm.settings import RunSettings
from newllm.training.callbacks import TrainProgress
from newllm.training.checkpoints import (
    checkpoint_folder,
    complete_checkpoint,
    newest_checkpoint,
    remove_except,
    remove_incomplete,
    write_whole,
)
from newllm.training.lagged_store import lagged_cache, remove_states

if TYPE_CHECKING:
    from newllm.data import PreparedData, TokenFile

PROJECTION = "projection"  # its folder, its entry in result.json, its name in the display
CELL, OPTIMIZER = "cell.safetensors", "optimizer.safetensors"  # in a checkpoint


@dataclass(frozen=True)
class HeldOut:
    """What a cell makes of held-out windows, by true recurrence."""

    effective_rank: float
    """Of the projections, see `models.projection.effective_rank`."""
    passes: int
    """Parallel passes, the first with zeros, until the target share of tokens is within the tolerance of the truth."""


@dataclass(frozen=True)
class ProjectionResult:
    """What a finished first phase says about itself."""

    size: int
    """Numbers P of a projection."""
    tokens: int
    """Of the stream."""
    iterations: int
    seconds: float
    """Over every continuation."""
    converged: float
    """Share of the tokens that had converged in the last iteration."""
    reached_target: bool
    before: HeldOut
    """The cell as initialised."""
    after: HeldOut
    curve: list[dict[str, float]]
    """Of each iteration: `loss` (OACD, mean over batches), `change` (mean square, since the iteration before),
    `converged` (share of tokens), `seconds` (since the beginning)."""


def train_projection(
    model: DProjLM,
    settings: RunSettings,
    data: PreparedData,
    folder: Path,
    on_progress: Callable[[TrainProgress], None] | None,
) -> ProjectionResult | None:
    """Trains the cell to the end, or continues; with cell=random or cell=learned it does nothing. folder receives
    metrics.jsonl and checkpoints.

    Raises UserError when the loss is not finite.
    """
    if model.config.cell != "diverse":
        return None
    folder.mkdir(exist_ok=True)
    remove_incomplete(folder)
    model.requires_grad_(False)
    model.cell.requires_grad_(True)
    return ProjectionTrainer(model, settings, data, folder, on_progress).run()


class ProjectionTrainer:
    """The stream, its projections so far, the optimizer, and the curve; `iterate` is one pass."""

    def __init__(
        self,
        model: DProjLM,
        settings: RunSettings,
        data: PreparedData,
        folder: Path,
        on_progress: Callable[[TrainProgress], None] | None,
    ) -> None:
        self.device = resolve_device(settings.device)
        self.model, self.settings, self.folder, self.on_progress = model.to(self.device), settings, folder, on_progress  # type: ignore[arg-type]
        self.ids, self.begins = stream(data.splits["train"], settings)
        self.validation = held_out_windows(data.splits["validation"], settings).to(self.device)
        self.precision = resolve_precision(settings.precision, self.device)
        self.optimizer = torch.optim.Adam(model.cell.parameters(), lr=settings.projection_lr)
        batches, tokens = self.ids.shape
        self.cache = lagged_cache(batches, tokens, model.state_size, folder, settings.lagged_memory)
        self.curve: list[dict[str, float]] = []
        self.seconds_before, self.started, self.last_save = 0.0, time.monotonic(), time.monotonic()

    @property
    def reached_target(self) -> bool:
        return bool(self.curve) and self.curve[-1]["converged"] >= self.settings.projection_target

    @property
    def done(self) -> bool:
        return self.reached_target or len(self.curve) == self.settings.projection_iterations

    def run(self) -> ProjectionResult:
        before = held_out(self.model, self.validation, self.settings)
        if (newest := newest_checkpoint(self.folder)) is not None:
            self.restore(newest)
        while not self.done:
            self.curve.append(self.iterate())
            write_whole(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.curve))
            if self.done or time.monotonic() - self.last_save >= 60 * self.settings.checkpoint_minutes:
                self.save()
        remove_states(self.folder)
        return ProjectionResult(
            size=self.model.state_size,
            tokens=self.ids.size,
            iterations=len(self.curve),
            seconds=self.curve[-1]["seconds"],
            converged=self.curve[-1]["converged"],
            reached_target=self.reached_target,
            before=before,
            after=held_out(self.model, self.validation, self.settings),
            curve=self.curve,
        )

    def iterate(self) -> dict[str, float]:
        """One pass over the stream: a step of the optimizer for each batch, and the projections it was taken with."""
        iteration = len(self.curve)
        seed = np.random.SeedSequence([self.settings.seed, iteration]).generate_state(1)[0]
        noise = torch.Generator(self.device).manual_seed(int(seed))
        last = torch.zeros(self.model.state_size, device=self.device)
        losses, changes, converged = [], [], []
        batches, tokens = self.ids.shape
        for batch in range(batches):
            sample = torch.tensor([batch])
            # (T, P): what the pass before has left; the first begins with nothing.
            kept = torch.zeros(tokens, self.model.state_size, device=self.device)
            if iteration:
                kept = self.cache.read(sample)[0].to(kept)
            lagged = torch.cat([last[None], kept[:-1]])
            lagged[torch.from_numpy(self.begins[batch])] = 0
            last = kept[-1]
            projections, loss = self.step(batch, lagged, noise)
            change = (projections - kept).square().mean(dim=1)
            self.cache.write(sample, projections[None])
            losses.append(loss)
            changes.append(change.mean().item())
            converged.append((change < self.settings.projection_tolerance).float().mean().item())
            self.report(batch, loss)
        return {
            "iteration": iteration + 1,
            "loss": float(np.mean(losses)),
            "change": float(np.mean(changes)),
            "converged": float(np.mean(converged)),
            "seconds": round(self.seconds_before + time.monotonic() - self.started, 3),
        }

    def step(self, batch: int, lagged: Tensor, noise: torch.Generator) -> tuple[Tensor, float]:
        """A step of the optimizer on a batch; its projections (T, P), detached, and its loss."""
        settings = self.settings
        # Each word once, however often it occurs: most of the cell's work is on its embedding.
        words, places = torch.from_numpy(self.ids[batch].astype(np.int64)).to(self.device).unique(return_inverse=True)
        if settings.projection_noise:
            drawn = torch.randn(lagged.shape, generator=noise, device=self.device)
            lagged = lagged + settings.projection_noise * drawn
        with autocast(self.device, self.precision):
            # In float32, so that the gradient of a frequent word is summed in it.
            drive = self.model.drive(words).float()
            projections = self.model.cell(lagged, F.embedding(places, drive))
        loss = oacd_loss(projections, settings.projection_mean_weight)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"{settings.model}: the loss of the {PROJECTION} is {loss.item()} in iteration {len(self.curve) + 1} "
                f"(lr {settings.projection_lr:g}, {self.precision}): try a lower --projection-lr"
            )
        self.optimizer.zero_grad()
        loss.backward()
        if settings.projection_clip:
            torch.nn.utils.clip_grad_norm_(self.model.cell.parameters(), settings.projection_clip)
        self.optimizer.step()
        return projections.detach(), loss.item()

    def report(self, batch: int, loss: float) -> None:
        if self.on_progress is None:
            return
        iterations, (batches, tokens) = len(self.curve), self.ids.shape
        step, total = iterations * batches + batch + 1, self.settings.projection_iterations * batches
        seconds = self.seconds_before + time.monotonic() - self.started
        self.on_progress(
            TrainProgress(
                model=self.settings.model,
                seed=self.settings.seed,
                phase=PROJECTION,
                step=step,
                total_steps=total,
                tokens=step * tokens,
                loss=loss,
                val_loss=None,
                tokens_per_second=step * tokens / seconds,
                seconds_left=(total - step) * seconds / step,
            )
        )

    def save(self) -> None:
        """After a pass: cell, optimizer, and the projections, of which nothing more is read after the last one."""
        folder = checkpoint_folder(self.folder, len(self.curve))
        with complete_checkpoint(folder) as staging:
            save_weights(self.model.cell, str(staging / CELL))
            moments = self.optimizer.state_dict()["state"]
            save_file({f"{n}.{name}": t for n, own in moments.items() for name, t in own.items()}, staging / OPTIMIZER)
            if not self.done:
                self.cache.save(staging)
        if not self.done:
            self.cache.saved(folder)
        remove_except(self.folder, {len(self.curve)})
        self.last_save = time.monotonic()

    def restore(self, checkpoint: Path) -> None:
        load_weights(self.model.cell, checkpoint / CELL)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(checkpoint / OPTIMIZER).items():
            n, _, name = key.partition(".")
            moments.setdefault(int(n), {})[name] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        iterations = int(checkpoint.name.rpartition("-")[2])
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        self.curve = [json.loads(line) for line in lines[:iterations]]
        self.seconds_before = self.curve[-1]["seconds"]
        if not self.done:
            self.cache.restore(checkpoint)


def stream(tokens: TokenFile, settings: RunSettings) -> tuple[np.ndarray, np.ndarray]:
    """The training text in batches (S, T): ids, and whether a document begins there. The incomplete rest is dropped."""
    limits = [len(tokens), settings.projection_tokens, *([settings.max_tokens] if settings.max_tokens else [])]
    size = min(settings.projection_batch, *limits)
    total = min(limits) // size * size
    begins = np.zeros(total, dtype=bool)
    begins[tokens.document_starts[tokens.document_starts < total]] = True
    return np.asarray(tokens.ids[:total]).reshape(-1, size), begins.reshape(-1, size)


def held_out_windows(tokens: TokenFile, settings: RunSettings) -> Tensor:
    """(R, T) ids: windows as in training, together about as many tokens as in a batch."""
    T: Any = settings.seq_length
    rows = max(1, min(settings.projection_batch, len(tokens)) // T)
    return torch.from_numpy(tokens.ids[: rows * T].astype(np.int64)).view(rows, -1)


@torch.no_grad()
def held_out(model: DProjLM, ids: Tensor, settings: RunSettings) -> HeldOut:
    """What the cell makes of windows (R, T). Raises UserError where its projections are not finite."""
    truth, _ = model.project(ids)
    if not truth.isfinite().all():
        raise UserError(
            f"{settings.model}: the cell of the {PROJECTION} gives numbers that are not finite on held-out text "
            f"(lr {settings.projection_lr:g}): try a lower --projection-lr"
        )
    drive, states, passes = model.drive(ids), torch.zeros_like(truth), 0
    near = 0.0
    while near < settings.projection_target and passes < ids.shape[1]:  # T passes are the truth, to rounding
        states, passes = model.cell(lag(states), drive), passes + 1
        near = ((states - truth).square().mean(dim=-1) < settings.projection_tolerance).float().mean().item()
    return HeldOut(effective_rank(truth.flatten(0, 1)), passes)
