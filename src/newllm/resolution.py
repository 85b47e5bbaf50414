"""Settings made complete: what a scale fills in, and what no run could work with.

A field that the chosen scale names (`scales/NAME.yaml`) takes its value from there where it is None. The order of
precedence is flag, then config file, then scale.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from newllm.errors import UserError, flag, nearest
from newllm.settings import BUDGET, FIRST_PHASE, PILE_TOKENIZER, CommonSettings, ExperimentSettings

SCALES_FOLDER = Path(__file__).parent / "scales"


def scale_names() -> list[str]:
    return sorted(path.stem for path in SCALES_FOLDER.glob("*.yaml"))


def load_scale(name: str) -> dict[str, Any]:
    """The values of a named scale."""
    if name not in scale_names():
        raise nearest(name, scale_names(), "scale")
    return yaml.safe_load((SCALES_FOLDER / f"{name}.yaml").read_text())


S = TypeVar("S", bound=CommonSettings)


def resolve(settings: S) -> S:
    """A copy of the settings in which the scale has filled every value left at None, and every value is checked."""
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    scale = load_scale(settings.scale)
    # A budget given in one way replaces the scale's budget given in another.
    if any(given[key] is not None for key in BUDGET):
        scale = {key: value for key, value in scale.items() if key not in BUDGET}
        if settings.max_tokens is None and settings.epochs is None:
            scale["epochs"] = 1.0
    if settings.data == "pile" and settings.tokenizer is None:
        scale["tokenizer"] = PILE_TOKENIZER
    filled: dict[str, Any] = {key: scale.get(key) if value is None else value for key, value in given.items()}
    check(type(settings)(**filled))
    # 2 in a file and 2.0 by flag are the same setting, and have the same hash.
    floats = {f.name for f in dataclasses.fields(settings) if f.type in ("float", "float | None")}
    as_floats = {name: float(filled[name]) for name in floats if filled[name] is not None}
    return type(settings)(**(filled | as_floats))


POSITIVE = (
    *("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size", "lr", "batch_size"),
    *("gradient_accumulation", "max_tokens", "samples", "epochs", "threads", "evaluations", "eval_tokens"),
    *("eval_batch_size", "sliding_stride", "jobs", *FIRST_PHASE, "gate_lr", "recall_facts"),
    *("lagged_passes", "lagged_grad_passes", "lagged_deep_passes"),
    *("projection_tokens", "projection_iterations", "projection_lr", "projection_batch", "projection_tolerance"),
    *("efficiency_seconds", "calibration_tokens", "distil_lr"),
)
# A window of one token predicts nothing; the cache is measured at half of the context, and a token is decoded after it;
# memories are swapped between two windows of recall.
AT_LEAST = {"seq_length": 2, "position_window": 2, "sliding_window": 2, "decode_context": 4, "patience": 0}
AT_LEAST |= {"recall_windows": 2, "projection_clip": 0, "projection_noise": 0, "projection_mean_weight": 0}
AT_LEAST |= dict.fromkeys(("max_grad_norm", "weight_decay", "checkpoint_minutes", "lagged_memory", "distil_tokens"), 0)
SHARES = (
    "warmup_ratio",
    "min_lr_ratio",
    "validation_share",
    "test_share",
    "adam_beta1",
    "adam_beta2",
    "recall_share",
    "recall_curriculum",
    "reversal_share",
    "lagged_deep_share",
    "projection_target",
)

MOST_THREADS = 1024
"""With many more torch's kernels end the process."""
MOST_EPOCHS = 10**9
"""Steps of many more could not be counted in 64 bits."""
SEEDS = 2**32
"""NumPy takes no seed from here on."""


def check_values(settings: CommonSettings) -> None:
    """Raises UserError for a value that is out of range whatever the others are; None is left to the scale."""
    check_positive(settings, *POSITIVE)
    for name, least in AT_LEAST.items():
        check_at_least(settings, least, name)
    check_shares(settings, *SHARES)
    for name in ("epochs", "reconstruction_epochs"):
        value = getattr(settings, name)
        if value is not None and value > MOST_EPOCHS:
            raise UserError(f"{flag(name)} is {value:g}: it must be at most {MOST_EPOCHS:,}")
    if settings.threads is not None:
        check_threads(settings.threads)
    for name in ("seed", "seeds"):
        check_seeds(name, getattr(settings, name, []))


def check_positive(settings: Any, *names: str) -> None:
    """Raises UserError where one of these values is not greater than 0; what is None, or not there, is left out."""
    for name in names:
        value = getattr(settings, name, None)
        if value is not None and not value > 0:
            raise UserError(f"{flag(name)} is {value}: it must be greater than 0")


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """Raises UserError where one of these values is less; what is None is left out."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"{flag(name)} is {value}: it must be at least {least}")


def check_shares(settings: Any, *names: str) -> None:
    """Raises UserError where one of these values does not lie in [0, 1)."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < 1:
            raise UserError(f"{flag(name)} is {value}: it must lie in [0, 1)")


def check_threads(threads: int) -> None:
    """Raises UserError for more threads than torch starts."""
    if threads > MOST_THREADS:
        raise UserError(f"--threads is {threads}: it must be at most {MOST_THREADS}")


def check_seeds(name: str, value: int | list[int], limit: int = SEEDS) -> None:
    """Raises UserError for a seed of this setting that is negative or not below the limit."""
    if any(not 0 <= seed < limit for seed in (value if isinstance(value, list) else [value])):
        raise UserError(f"{flag(name)} is {value}: a seed is a whole number from 0 to {limit - 1}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a file is of the type that a field of a dataclass has."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if inner:  # int | None
        return any(fits(value, one) for one in inner)
    kind = int | float if hint is float else hint
    return isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def check(settings: CommonSettings) -> None:
    """Raises UserError for values no run could work with; settings must be resolved."""
    check_values(settings)
    if settings.sliding_stride >= settings.sliding_window:  # type: ignore[operator]
        raise UserError(
            f"--sliding-stride {settings.sliding_stride} must be less than --sliding-window {settings.sliding_window}: "
            "the rest of the window is the context"
        )
    if settings.hidden_size % settings.num_heads:  # type: ignore[operator]
        raise UserError(
            f"--hidden-size {settings.hidden_size} does not divide into --num-heads {settings.num_heads}: "
            f"choose a multiple of {settings.num_heads}"
        )
    if settings.distil_tokens and settings.start_from is None:
        raise UserError(
            f"--distil-tokens {settings.distil_tokens} teaches layers what those of a trained model give: name that "
            "model with --start-from"
        )
    if isinstance(settings, ExperimentSettings):
        if not settings.models:
            raise UserError("--models is empty: name at least one preset, for example --models pythia")
        if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
            raise UserError(f"--seeds {settings.seeds}: give at least one seed, each only once")
        if len(set(settings.models)) < len(settings.models):
            raise UserError(f"--models names a model twice: {' '.join(settings.models)}")
