"""Every value of an experiment, as plain dataclasses: each field is a command line flag and a YAML key.

This module imports neither torch nor transformers, so that `newllm --help` stays quick. A field that is None here is
filled by the chosen scale, see `resolution`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from newllm.paths import plugin_hash, spelt_alike, user_path, weights_hash

CONFIGS_FOLDER = Path(__file__).parent / "experiments" / "configs"

CORPORA = ("shakespeare", "pile")
HUB = "hf:"  # begins the name of a Hugging Face data set in `--data`
PILE_TOKENIZER = "EleutherAI/pythia-70m"
Precision = Literal["auto", "bf16", "float32"]


@dataclass(kw_only=True)
class ShapeSettings:
    """Size of the models; the same for every model of a comparison."""

    hidden_size: int | None = None
    """Width D of the residual stream."""
    num_layers: int | None = None
    """Number of layers."""
    num_heads: int | None = None
    """Number of attention heads H; the head size is D / H."""
    intermediate_size: int | None = None
    """Width of the MLP."""

    def shape(self) -> dict[str, Any]:
        """The arguments of `create_model` that give a model this size."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ShapeSettings)}


@dataclass(kw_only=True)
class DataSettings:
    """Which text, which tokenizer, which windows."""

    data: str = "shakespeare"
    """Corpus: 'shakespeare' (embedded), 'pile', 'hf:NAME[:CONFIG]', or a path (.txt .jsonl[.zst] .parquet, folder)."""
    text_field: str = "text"
    """Name of the text column in .jsonl, .parquet and Hugging Face data sets."""
    tokenizer: str | None = None
    """'bpe' trains a byte-level BPE on the training split; else a Hugging Face tokenizer by name or folder."""
    vocab_size: int | None = None
    """Words of the BPE to train; ignored with a ready tokenizer, whose own size is used."""
    seq_length: int | None = None
    """Tokens T of a training window."""
    validation_share: float = 0.05
    """Share of the documents held out for validation (own corpora; the embedded one has a fixed split)."""
    test_share: float = 0.05
    """Share of the documents held out for the test split."""
    max_documents: int | None = None
    """Read at most this many documents; for streams such as the Pile the default of None means 20,000."""
    cache_dir: str | None = None
    """Folder for tokenizers and token files; default $NEWLLM_CACHE or ~/.cache/newllm."""


@dataclass(kw_only=True)
class TrainingSettings:
    """Budget and optimiser."""

    max_tokens: int | None = None
    """Budget: stop after this many training tokens. Without it: samples × epochs."""
    samples: int | None = None
    """Budget: training windows in an epoch; None takes all of the training split."""
    epochs: float | None = None
    """Budget: passes over the samples."""
    patience: int | None = None
    """Stop after this many evaluations without a better validation loss; 0 never stops early."""
    lr: float | None = None
    """Peak learning rate of AdamW."""
    min_lr_ratio: float = 0.1
    """The cosine ends at this share of the peak learning rate."""
    warmup_ratio: float = 0.05
    """Share of all optimizer steps spent in linear warm-up."""
    weight_decay: float = 0.1
    """Weight decay on matrices; none on biases, norms and gates."""
    adam_beta1: float = 0.9
    """First AdamW beta."""
    adam_beta2: float = 0.95
    """Second AdamW beta."""
    gate_lr: float = 0.01
    """Peak learning rate of gates of compressive memories and of contexts' own_rate: at the model's none would move."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 turns it off."""
    batch_size: int | None = None
    """Windows in a micro-batch."""
    gradient_accumulation: int = 1
    """Micro-batches in an optimizer step."""
    streaming: bool = False
    """Rows go on from batch to batch with the state they had, which is reset at document starts; no gradient goes back
    beyond a batch. For models whose state does not grow with the text."""
    reconstruction_lr: float = 1e-3
    """Peak learning rate of the first phase, for models that have one (v_dproj with restore=two_phase)."""
    reconstruction_epochs: float = 10
    """Passes of the first phase over the samples (fewer where --max-tokens ends it), and how often it measures its
    validation loss; --patience may end it sooner."""
    start_from: str | None = None
    """Folder of a trained model, of newllm or GPT-NeoX, whose weights the models start from (`newllm adapt`)."""
    calibration_tokens: int = 32_768
    """With --start-from: tokens of the training split by which keys and values are fitted to smaller ones."""
    distil_tokens: int = 0
    """With --start-from: tokens on which layers that are others than the trained ones first learn to give what those
    gave for the same input, each by itself; not in the budget. 0 for none."""
    distil_lr: float = 1e-3
    """Learning rate of AdamW then, falling to 0 in a line; gates have --gate-lr."""
    precision: Precision = "auto"
    """'auto' is bf16 autocast where the device computes it natively, else float32."""
    device: str = "auto"
    """'auto' is cuda where there is one, else cpu."""
    threads: int | None = None
    """CPU threads for torch; None leaves torch's choice."""
    evaluations: int | None = None
    """How many times a run measures the validation loss, at equal distances; with epochs ≥ 1 at least once an epoch."""
    checkpoint_minutes: float = 2.0
    """A checkpoint is written at least this often, and at every evaluation: an interrupted run loses little."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Extra loggers of the Hugging Face Trainer."""


FIRST_PHASE = ("reconstruction_lr", "reconstruction_epochs")


@dataclass(kw_only=True)
class RecallSettings:
    """Facts put into real text, and asked for segments later: what is trained on, and what is measured."""

    recall_share: float = 0.0
    """Share of the optimizer steps that train on windows with facts and questions instead of plain text."""
    recall_curriculum: float = 0.5
    """Share of these steps in which windows grow from two segments to --seq-length: several short ones then stand in
    place of a long one. What is told just before is learnt first, and much sooner than among a long text."""
    recall_segment: int = 32
    """Tokens of a segment, by which distances are counted; for compressive memories their segment_length."""
    recall_distances: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Segments between fact and question, each measured: so often has a memory been written when it is asked."""
    recall_facts: int = 2
    """Facts in a window, one of which is asked: telling them apart takes more than a list of what was said."""
    recall_windows: int = 200
    """Held-out windows for each distance."""


@dataclass(kw_only=True)
class ReversalSettings:
    """Facts told in one direction and asked in both: what is trained on. SYSTEMS §14."""

    reversal_share: float = 0.0
    """Share of the optimizer steps that train on sentences of the reversal task instead of plain text. It decides how
    often each is read, which the report says: this share of all training tokens / tokens of the sentences."""
    reversal_mode: Literal["forward", "reversed_entities"] = "forward"
    """'forward' trains on the sentences as they are; 'reversed_entities' also on each with its words in reverse
    order, names kept whole."""


@dataclass(kw_only=True)
class LaggedSettings:
    """Lagged Cache Training, for models that feed a state of theirs back. SYSTEMS §9."""

    lagged_passes: int = 1
    """Forward passes in a step, each with the states of the one before; as many as tokens in a window make the forward
    that of true recurrence."""
    lagged_grad_passes: int = 1
    """So many of the last passes carry gradient."""
    lagged_deep_share: float = 0.0
    """Share of the optimizer steps that take more passes instead: they keep the fixed point stable."""
    lagged_deep_passes: int = 4
    """Passes of these deeper steps; all of them carry gradient."""
    lagged_memory: float = 1.0
    """Gigabytes up to which the states of all samples are kept in memory; above, in a file of the run folder."""
    step_by_step: bool = False
    """Train by true recurrence instead, one token after the other, with gradients through all of them: the slow
    reference."""


@dataclass(kw_only=True)
class ProjectionSettings:
    """The first phase of models with a diverse projection, over the text as one stream. SYSTEMS §10."""

    projection_tokens: int = 2_000_000
    """At most so many tokens in the stream, from the beginning of the training split; and no more than --max-tokens."""
    projection_iterations: int = 100
    """At most so many passes over the stream, each with the projections that the one before has left."""
    projection_lr: float = 0.003
    """Learning rate of Adam in this phase."""
    projection_batch: int = 5000
    """Tokens in a step of it, among which projections are to be diverse."""
    projection_clip: float = 2.0
    """Its gradient clipping; 0 turns it off."""
    projection_noise: float = 0.05
    """Standard deviation of the noise on the projections it reads."""
    projection_mean_weight: float = 0.1
    """Weight of the squared length of the mean projection in its loss."""
    projection_tolerance: float = 0.03
    """A token has converged when its projection has moved by less than this since the pass before: in mean square over
    its numbers, the mean square of a projection being 1."""
    projection_target: float = 0.95
    """The phase ends when this share of the tokens has converged."""


BUDGET = ("max_tokens", "samples", "epochs")
"""What says how long to train. One of them given replaces all of a scale's, and as a flag all of a config file's."""

SPECIAL = (
    *FIRST_PHASE,
    "gate_lr",
    "streaming",
    "start_from",
    "calibration_tokens",
    "distil_tokens",
    "distil_lr",
    *(
        f.name
        for cls in (RecallSettings, ReversalSettings, LaggedSettings, ProjectionSettings)
        for f in dataclasses.fields(cls)
    ),
)
"""What only some models or some experiments use."""


@dataclass(kw_only=True)
class EvaluationSettings:
    """What is measured after training."""

    eval_tokens: int | None = None
    """At most this many held-out tokens for each perplexity; None takes the whole split."""
    eval_batch_size: int = 16
    """Windows in an evaluation batch."""
    position_window: int | None = None
    """Tokens of the windows in which perplexity is taken by position; longer than --seq-length, it shows how a model
    does beyond the lengths it was trained on."""
    sliding_window: int | None = None
    """Context of the sliding-window perplexity, in tokens."""
    sliding_stride: int | None = None
    """Tokens scored in each step of the sliding window."""
    decode_context: int | None = None
    """Context length, in tokens, at which decoding latency and cache bytes are measured."""
    efficiency: bool = True
    """Measure training speed, peak memory, prefill and decoding latency, in processes of their own, in turn."""
    efficiency_seconds: float = 6.0
    """Time for each model's speed measurement."""


@dataclass(kw_only=True)
class CommonSettings(
    ShapeSettings,
    DataSettings,
    TrainingSettings,
    RecallSettings,
    ReversalSettings,
    LaggedSettings,
    ProjectionSettings,
    EvaluationSettings,
):
    """Everything the runs of a comparison share."""

    scale: str = "quickstart"
    """Named size and budget: quickstart, small or pythia-70m; fills every value not set by flag or config."""
    plugin: str | None = None
    """Python file with your own layers (and presets), registered before anything else."""


@dataclass(kw_only=True)
class ExperimentSettings(CommonSettings):
    """A comparison: several models, one or more seeds, one text, one budget."""

    models: list[str] = field(default_factory=lambda: ["pythia", "pythia_alibi", "gqa", "mqa"])
    """Presets or layer types; the first is the baseline. Options follow a colon: gqa:num_kv_heads=4,window=128"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds; each model is trained once with each."""
    name: str = "compare"
    """Title of the report."""
    out: str | None = None
    """Result folder; default runs/NAME-SCALE. Started again with the same folder, finished runs are kept."""
    reuse: list[str] = field(default_factory=list)
    """Folders or results.json files of earlier comparisons, on whichever machine: their runs of the same settings, text
    and precision are taken from there instead of trained again. docs/experiments/*.json are such files, in bf16."""
    jobs: int | None = None
    """Runs trained at the same time, each in a process of its own on its share of the threads. None: on a CPU as many
    as there are cores, or as have --threads each, but not more than runs nor than one for each 4 GiB of memory; on a
    GPU one."""

    def runs(self) -> list[RunSettings]:
        """One RunSettings for each seed and model, seed by seed, so that a partial comparison is a fair one."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(CommonSettings)}
        return [RunSettings(**common, model=model, seed=seed) for seed in self.seeds for model in self.models]


@dataclass(kw_only=True)
class RunSettings(CommonSettings):
    """One model trained with one seed."""

    model: str = "pythia"
    """Preset or layer type, with options after a colon: pythia:position=none"""
    seed: int = 0
    """Seed of initialisation and data order."""

    def hash(self, *, training_only: bool = False) -> str:
        """Identifies what the run computes: it is reused only for the same hash.

        Threads change rounding alone: an interrupted run ends bit-equal only with as many as before.
        training_only leaves out what is measured after training, so that another measurement trains nothing again.
        """
        left_out = {"cache_dir", "report_to", "checkpoint_minutes", "threads", "efficiency", "efficiency_seconds"}
        if training_only:
            # eval_tokens and eval_batch_size also shape the validation loss that chooses the checkpoint.
            after = {field.name for field in dataclasses.fields(EvaluationSettings)}
            after |= {"recall_distances", "recall_windows"}
            left_out |= after - {"eval_tokens", "eval_batch_size"}
        # Most models have no first phase, no gates and no facts to learn: what belongs to one counts only where set.
        defaults = RunSettings()
        left_out |= {key for key in SPECIAL if getattr(self, key) == getattr(defaults, key)}
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
        values["data"] = corpus_name(self.data)
        if self.tokenizer is not None:
            values["tokenizer"] = spelt_alike(self.tokenizer)
        if self.plugin is not None:
            values["plugin"] = plugin_hash(user_path(self.plugin))
        if self.start_from is not None:
            values["start_from"] = weights_hash(user_path(self.start_from))
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def corpus_name(data: str) -> str:
    """What `--data` is called, however it is spelt; which text that is tells the fingerprint of its content."""
    if data in CORPORA:
        return data
    if data.startswith(HUB):
        return HUB + spelt_alike(data.removeprefix(HUB))
    return spelt_alike(data)


def to_yaml(settings: Any) -> str:
    """The settings as YAML, readable back by `--config` in any folder: text and plugin by their full paths."""
    values = dataclasses.asdict(settings)
    for name in ("data", "plugin", "start_from"):
        if (value := values.get(name)) is not None and value not in CORPORA and (path := user_path(value)).exists():
            values[name] = str(path.resolve())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
