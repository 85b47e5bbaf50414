"""The trainer of language models: one data order for the whole run, and validation by the function of evaluation.

Rows may keep their states from batch to batch (--streaming); a model that feeds a state back is trained by Lagged Cache
Training. What makes a run exact to resume is in `training.exact`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import TrainerState, TrainingArguments

from newllm.data.tasks import task_of_each_step, task_shares
from newllm.devices import resolve_precision
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.models import TransformerLM
from newllm.models.layers import Layer
from newllm.models.reconstruction import Reconstruction
from newllm.models.recurrent import RecurrentLM
from newllm.settings import RunSettings
from newllm.training.callbacks import FlowCallback, Schedule, out_of_patience
from newllm.training.exact import ExactTrainer, common_arguments
from newllm.training.lagged_cache import KeyedWindows, LaggedTraining

if TYPE_CHECKING:
    from newllm.data import TokenFile


STATES = "states.safetensors"  # with --streaming, what the rows remember at a checkpoint


class RunSampler(Sampler[int]):
    """The data order of a whole run: a new permutation of the windows for every pass, all from one seed.

    The Trainer sees one long epoch. So a batch may span two passes (no short batches), and a resumed run finds its
    place by counting batches, with nothing to restore.

    Of K tasks with a share each, a step of theirs takes the next windows of the task instead, each once: for task k the
    indices num_windows + k, num_windows + k + K, … (see `data.tasks`).
    """

    def __init__(
        self,
        num_windows: int,
        num_samples: int,
        seed: int,
        samples_per_step: int = 1,
        task_shares: Sequence[float] = (),
    ) -> None:
        self.num_windows, self.num_samples, self.seed = num_windows, num_samples, seed
        self.samples_per_step, self.task_shares = samples_per_step, task_shares

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        windows, shares = self._passes(), self.task_shares
        tasks = [itertools.count(self.num_windows + task, len(shares)) for task in range(len(shares))]
        steps = self.num_samples // self.samples_per_step
        for task in itertools.islice(task_of_each_step(shares), steps):
            yield from itertools.islice(windows if task is None else tasks[task], self.samples_per_step)

    def _passes(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.num_windows, generator=generator).tolist()


class LMTrainer(ExactTrainer):
    """Trains a language model, or what comes before it, on windows or streams of text."""

    model: TransformerLM | Reconstruction

    def __init__(
        self,
        *,
        settings: RunSettings,
        schedule: Schedule,
        validation: TokenFile,
        tokens_per_step: int,
        phase: str,
        args: TrainingArguments,
        **kwargs: Any,
    ) -> None:
        precision = resolve_precision(settings.precision, args.device)
        flow = FlowCallback(settings, schedule, precision, phase)
        super().__init__(flow=flow, precision=precision, args=args, **kwargs)
        self.settings, self.schedule, self.validation = settings, schedule, validation
        self.tokens_per_step = tokens_per_step
        # With --streaming, what the rows have read in the batches before; through a quantised cache no gradient flows.
        self.states = self.model.make_cache("model") if settings.streaming else None  # type: ignore[operator]
        self.lagged: LaggedTraining | None = None
        if isinstance(self.model, RecurrentLM) and self.model.state_size and not settings.step_by_step:
            self.lagged = LaggedTraining(self.model, settings, len(self.train_dataset), self.folder)  # type: ignore[arg-type]
            self.train_dataset = KeyedWindows(self.train_dataset)  # type: ignore[arg-type]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        windows = len(self.train_dataset)  # type: ignore[arg-type]
        samples_per_step = self.tokens_per_step // self.settings.seq_length  # type: ignore[operator]
        num_samples = self.schedule.total_steps * samples_per_step
        if self.settings.streaming:  # a StreamDataset holds the rows of all passes in their order
            return SequentialSampler(range(num_samples))
        shares = list(task_shares(self.settings).values())
        return RunSampler(windows, num_samples, self.settings.seed, samples_per_step, shares)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, and where layers have gates a third group: gate_lr with the same schedule, no weight decay."""
        optimizer = super().create_optimizer(model)
        layers = (module for module in self.model.modules() if isinstance(module, Layer))
        gates = [gate for layer in layers for gate in layer.gate_parameters() if gate.requires_grad]
        if gates:
            ids = set(map(id, gates))
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            optimizer.add_param_group({"params": gates, "lr": self.settings.gate_lr, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, but that of Lagged Cache Training for a model that feeds a state back.

        With --streaming, read through the states that the batch before has left.
        """
        if self.lagged is not None:
            return self.lagged.loss(inputs, self.state.global_step, kwargs["num_items_in_batch"])
        if self.states is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        chunk: dict[str, Any] = dict(inputs)
        self.states.reset_rows(chunk.pop("starts"))
        if chunk["attention_mask"].all():
            del chunk["attention_mask"]  # earlier padding is forgotten: a new document follows it
        loss = super().compute_loss(model, chunk | {"past_key_values": self.states}, *args, **kwargs)
        self.states.detach_()
        return loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """At least 1: a stream may end in chunks of one token, and a step without targets has the loss 0, not NaN."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count if self.states is None else count.clamp(min=1)  # type: ignore[union-attr]

    def is_done(self, state: TrainerState) -> bool:
        return super().is_done(state) or out_of_patience(state.log_history, self.settings)

    def measure(self) -> dict[str, float]:
        """The validation loss, by the same function as the final evaluation."""
        return {"eval_loss": token_weighted_loss(self.model, self.validation, self.settings)}  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.lagged is not None and "loss" in logs:
            logs["residual"] = self.lagged.take_residual()
        logs["tokens"] = self.state.global_step * self.tokens_per_step
        super().log(logs, start_time)

    def save_more(self, staging: Path) -> None:
        if self.states is not None:
            exported = self.states.export()
            save_file({name: state.contiguous() for name, state in exported.items()}, staging / STATES)
        if self.lagged is not None:
            self.lagged.cache.save(staging)

    def saved(self, checkpoint: Path) -> None:
        if self.lagged is not None:
            self.lagged.cache.saved(checkpoint)

    def load_more(self, checkpoint: Path) -> None:
        if self.states is not None:
            self.states.restore(load_file(checkpoint / STATES, device=str(self.args.device)))
        if self.lagged is not None:
            self.lagged.cache.restore(checkpoint)


def training_arguments(settings: RunSettings, folder: Path, steps: int) -> TrainingArguments:
    return common_arguments(
        settings,
        folder,
        steps,
        metric_for_best_model="loss",
        report_to=list(settings.report_to) or "none",
    )
