"""Training that starts from a trained model instead of from random weights (SYSTEMS §12)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from newllm.data.hub import load_tokenizer
from newllm.data.windows import WindowDataset
from newllm.devices import resolve_device
from newllm.errors import UserError
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.evaluation.reading import as_measured
from newllm.models import TransformerLM
from newllm.models.adaptation import adapt
from newllm.models.interop import load_trained, trained_folder, trained_shape
from newllm.paths import user_path
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data import PreparedData


@dataclass(frozen=True)
class Start:
    """What a run has begun with."""

    source: str
    """Name of the folder."""
    val_loss: float
    """Validation loss in nats per token before any training."""
    own: list[str]
    """Parameters of which the trained model had nothing."""


def check_start(settings: CommonSettings) -> None:
    """Raises UserError where there is no such model, or it is of another size than the settings say."""
    if settings.start_from is None:
        return
    for name, size in trained_shape(settings.start_from).items():
        if getattr(settings, name) != size:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(settings, name)}: the model in {settings.start_from} has {size}")


def start_from(model: TransformerLM, settings: CommonSettings, data: PreparedData) -> Start:
    """Puts the weights of settings.start_from into the model.

    Raises:
        UserError: its tokenizer is not the data's, or its size not the model's.
    """
    assert settings.start_from is not None
    assert settings.seq_length is not None
    path, _ = trained_folder(settings.start_from)
    if load_tokenizer(str(path)).get_vocab() != data.tokenizer.get_vocab():
        raise UserError(
            f"--start-from {settings.start_from}: it has another tokenizer than the text: --tokenizer {path}"
        )
    count = max(1, settings.calibration_tokens // settings.seq_length)
    windows = WindowDataset(data.splits["train"], settings.seq_length, count)
    ids = torch.stack([windows[n]["input_ids"] for n in range(len(windows))])
    device = resolve_device(settings.device)
    source = load_trained(path).to(device)  # type: ignore[arg-type]
    model.to(device)  # type: ignore[arg-type]
    with as_measured(source, "float32"):
        own = adapt(source, model, ids.split(settings.eval_batch_size))
    loss = token_weighted_loss(model, data.splits["validation"], settings)
    return Start(user_path(settings.start_from).resolve().name, loss, own)
