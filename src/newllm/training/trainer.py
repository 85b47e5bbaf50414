"""The Hugging Face Trainer, made exact to resume.

What is ours: one data order for the whole run, autocast and validation loss by the functions that evaluation uses too,
checkpoints that are complete or not there, and the schedule of `callbacks.FlowCallback`. The rest is the Trainer's:
the step itself, clipping, accumulation, the optimizer's and the learning rate's state, DDP through accelerate.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import DefaultFlowCallback, PrinterCallback, Trainer, TrainerState, TrainingArguments

from newllm.data.tasks import task_of_each_step, task_shares
from newllm.devices import autocast, resolve_device, resolve_precision
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.models import TransformerLM
from newllm.models.layers import Layer
from newllm.models.reconstruction import Reconstruction
from newllm.models.recurrent import RecurrentLM
from newllm.settings import RunSettings
from newllm.training.callbacks import FlowCallback, Schedule
from newllm.training.checkpoints import checkpoint_folder, complete_folder, remove_except
from newllm.training.lagged_cache import KeyedWindows, LaggedTraining

if TYPE_CHECKING:
    from newllm.data import TokenFile


WEIGHTS = "model.safetensors"
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


class LMTrainer(Trainer):
    """The Hugging Face Trainer with this project's data order, precision, validation loss and checkpoints."""

    model: TransformerLM | Reconstruction

    def __init__(
        self,
        *,
        settings: RunSettings,
        schedule: Schedule,
        validation: TokenFile,
        tokens_per_step: int,
        phase: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings, self.schedule, self.validation = settings, schedule, validation
        self.tokens_per_step = tokens_per_step
        self.precision = resolve_precision(settings.precision, self.args.device)
        self.flow = FlowCallback(settings, schedule, self.precision, phase)
        self.seconds_before, self.started = 0.0, time.monotonic()
        # With --streaming, what the rows have read in the batches before; through a quantised cache no gradient flows.
        self.states = self.model.make_cache("model") if settings.streaming else None  # type: ignore[operator]
        self.lagged: LaggedTraining | None = None
        if isinstance(self.model, RecurrentLM) and self.model.state_size and not settings.step_by_step:
            folder = Path(str(self.args.output_dir))
            self.lagged = LaggedTraining(self.model, settings, len(self.train_dataset), folder)  # type: ignore[arg-type]
            self.train_dataset = KeyedWindows(self.train_dataset)  # type: ignore[arg-type]
        self.remove_callback(PrinterCallback)
        self.remove_callback(DefaultFlowCallback)
        self.add_callback(self.flow)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        windows = len(self.train_dataset)  # type: ignore[arg-type]
        samples_per_step = self.tokens_per_step // self.settings.seq_length  # type: ignore[operator]
        num_samples = self.schedule.total_steps * samples_per_step
        if self.settings.streaming:  # a StreamDataset holds the rows of all passes in their order
            return SequentialSampler(range(num_samples))
        shares = list(task_shares(self.settings).values())
        return RunSampler(windows, num_samples, self.settings.seed, samples_per_step, shares)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices, embeddings among them; not biases, norms and gates, which are vectors."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

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

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Our own autocast instead of accelerate's, which would patch the model's forward and upcast its outputs."""
        return autocast(self.args.device, self.precision)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not reported, and counting parameters in every step costs time."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The validation loss, by the same function as the final evaluation."""
        metrics = {"eval_loss": token_weighted_loss(self.model, self.validation, self.settings)}  # type: ignore[arg-type]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.lagged is not None and "loss" in logs:
            logs["residual"] = self.lagged.take_residual()
        logs["tokens"] = self.state.global_step * self.tokens_per_step
        logs["seconds"] = round(self.seconds_before + time.monotonic() - self.started, 3)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's, but complete or not there; keeps this checkpoint and the best one."""
        folder = Path(str(self.args.output_dir))
        checkpoint = checkpoint_folder(folder, self.state.global_step)
        with complete_folder(checkpoint) as staging:
            save_weights(self.model, str(staging / WEIGHTS))
            if self.states is not None:
                exported = self.states.export()
                save_file({name: state.contiguous() for name, state in exported.items()}, staging / STATES)
            if self.lagged is not None:
                self.lagged.cache.save(staging)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_rng_state(str(staging))
            self.state.save_to_json(str(staging / "trainer_state.json"))
        if self.lagged is not None:
            self.lagged.cache.saved(checkpoint)
        remove_except(folder, {self.state.global_step, self.state.best_global_step or 0})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Strict, where the Trainer's own leaves a weight it does not find as it was initialised."""
        load_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS)
        if self.states is not None:
            self.states.restore(load_file(Path(resume_from_checkpoint) / STATES, device=str(self.args.device)))
        if self.lagged is not None:
            self.lagged.cache.restore(Path(resume_from_checkpoint))

    def run(self, checkpoint: Path | None) -> TrainerState:
        """Trains to the end, from a checkpoint where there is one.

        The Trainer reads optimizer and random state of a checkpoint with torch.load(weights_only=True): the files are
        this run's own, in the user's own folder.
        """
        self.started = time.monotonic()
        if checkpoint is not None:
            self.seconds_before = read_state(checkpoint).log_history[-1]["seconds"]
        with self.flow.saving_on_interrupt():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self.state


def read_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def training_arguments(settings: RunSettings, folder: Path, steps: int) -> TrainingArguments:
    device = resolve_device(settings.device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,  # type: ignore[arg-type]
        gradient_accumulation_steps=settings.gradient_accumulation,
        optim="adamw_torch_fused",
        learning_rate=settings.lr,  # type: ignore[arg-type]
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="cosine_warmup_with_min_lr",  # the variant whose first step has a learning rate above 0
        lr_scheduler_kwargs={"min_lr_rate": settings.min_lr_ratio},
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of all steps
        metric_for_best_model="loss",
        save_strategy="steps",  # our FlowCallback decides when; with "no" the Trainer would not note the best step
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        average_tokens_across_devices=False,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    if arguments.parallel_mode.value == "not_distributed":
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process on several GPUs: DataParallel would alter the batch
    return arguments
