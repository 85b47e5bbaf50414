"""What `newllm bench lagged` can be told; no torch here, so that --help stays quick."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from newllm.bench.settings import ShapeBench, check_plot, refuse_twice
from newllm.errors import UserError, nearest
from newllm.resolution import check_seeds, resolve
from newllm.settings import LaggedSettings, Precision, RunSettings

STEP_BY_STEP, LAGGED = "step_by_step", "lagged"


@dataclass(kw_only=True)
class LaggedBench(ShapeBench):
    """`newllm bench lagged`."""

    model: str = "continuous_fuse"
    """A model that feeds a state back."""
    methods: list[str] = field(
        default_factory=lambda: [STEP_BY_STEP, LAGGED, "lagged:passes=2", "lagged:passes=2,grad_passes=2"]
    )
    """Ways to train it: 'step_by_step', and 'lagged' with options passes, grad_passes, deep_share, deep_passes. The
    others are compared with the first."""
    vocab_size: int = 8192
    """Words of the vocabulary."""
    batch_size: int = 8
    """Windows in a batch."""
    seq_length: int = 128
    """Tokens of a window."""
    samples: int = 10_000
    """Windows of an epoch, whose time is told."""
    rounds: int = 5
    """Rounds; in each, every method works once."""
    warmup: int = 1
    """Steps at the start of a method's turn that are not counted."""
    steps: int = 2
    """Training steps of a method's turn."""
    precision: Precision = "auto"
    """'auto' is bf16 autocast where the device computes it natively, else float32."""
    quality: bool = False
    """Then train with every method, for equally many epochs and for as long as the first method takes, and measure the
    perplexity of the test split by true recurrence."""
    data: str = "shakespeare"
    """Corpus of these runs, as of `newllm train`."""
    quality_samples: int = 512
    """Training windows of an epoch of that."""
    quality_epochs: float = 4.0
    """Epochs of the first method."""
    quality_evaluations: int = 4
    """How often each of these runs measures the validation loss, which chooses the weights that are kept."""
    quality_tokens: int = 10_000
    """At most so many tokens of the validation and of the test split."""
    quality_untimed: list[str] = field(default_factory=list)
    """Those of --methods that are compared at equal epochs alone; the runs at equal time cost most."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of these runs."""
    lr: float = 1e-3
    """Their peak learning rate."""
    plot: str | None = None
    """HTML file for a plot of these runs: perplexity against training time, and at equal epochs."""

    def run_settings(self, method: str, seed: int, steps: int) -> RunSettings:
        """A training run with a method. Its budget is told in tokens: one in epochs would add evaluations."""
        return resolve(
            RunSettings(
                model=self.model,
                seed=seed,
                data=self.data,
                **self.shape(),
                **method_settings(method),
                seq_length=self.seq_length,
                batch_size=self.batch_size,
                samples=self.quality_samples,
                max_tokens=steps * self.batch_size * self.seq_length,
                evaluations=self.quality_evaluations,
                eval_tokens=self.quality_tokens,
                patience=0,
                lr=self.lr,
                precision=self.precision,
                device=self.device,
                threads=self.threads,
            )
        )

    def kept_bytes(self) -> int:
        """Bytes of the states of all windows of an epoch, in memory or in a file."""
        return 2 * self.samples * self.seq_length * self._state_size()

    def _state_size(self) -> int:
        from newllm.models import meta_model

        return meta_model(self.model, **self.shape()).state_size

    def check(self) -> None:
        """Also for an unknown method or model, and one without a state."""
        super(LaggedBench, dataclasses.replace(self, seeds=self.seeds and [1])).check()  # 0 is a seed
        check_seeds("seeds", self.seeds)
        check_plot(self.plot)
        if self.plot is not None and not self.quality:
            raise UserError(f"--plot {self.plot} draws the runs of --quality true: give both or neither")
        refuse_twice("--methods", self.methods)
        for method in self.quality_untimed:
            if method not in self.methods[1:]:
                raise UserError(f"--quality-untimed names {method}: give those of --methods after the first")
        from newllm.training.suitability import check_suitability

        if not self._state_size():
            raise UserError(f"--model {self.model} feeds no state back: choose one that does, as continuous_fuse")
        for method in self.methods:
            method_settings(method)
            try:
                check_suitability(self.run_settings(method, 0, steps=1), [self.model])
            except UserError as error:
                raise UserError(f"method '{method}': {error}") from error
        steps = math.ceil(self.quality_epochs * self.quality_samples / self.batch_size)
        if self.quality and self.quality_evaluations > steps:
            raise UserError(
                f"--quality-evaluations is {self.quality_evaluations}: it must be no more than the {steps} steps of "
                f"{self.quality_epochs} epochs of {self.quality_samples} windows"
            )


def method_settings(method: str) -> dict[str, Any]:
    """The settings of a training run that say 'lagged:passes=2,grad_passes=2' or 'step_by_step'.

    Raises:
        UserError: an unknown method or option, or a value of another kind than the setting's.
    """
    name, _, options = method.partition(":")
    if name not in (STEP_BY_STEP, LAGGED):
        raise nearest(name, [STEP_BY_STEP, LAGGED], "method", "in --methods")
    if name == STEP_BY_STEP and options:
        raise UserError(f"method '{method}': step_by_step has no options; those of lagged are as in {LAGGED}:passes=2")
    kinds = {field.name: str(field.type) for field in dataclasses.fields(LaggedSettings)}
    del kinds[STEP_BY_STEP]
    settings: dict[str, Any] = {STEP_BY_STEP: name == STEP_BY_STEP}
    for item in filter(None, options.split(",")):
        key, _, value = item.partition("=")
        kind = kinds.get(f"lagged_{key}")
        if kind is None:
            known = [setting.removeprefix("lagged_") for setting in kinds]
            raise nearest(key, known, "option", f"of method '{name}'")
        try:
            settings[f"lagged_{key}"] = int(value) if kind == "int" else float(value)
        except ValueError:
            what, example = ("a whole number", 2) if kind == "int" else ("a number", 0.1)
            raise UserError(
                f"method '{method}': {key} is '{value}': it must be {what}, as in {LAGGED}:{key}={example}"
            ) from None
    return settings
