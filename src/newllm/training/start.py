"""Training that starts from a trained model instead of from random weights (SYSTEMS §12)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from newllm.data.hub import load_tokenizer
from newllm.data.windows import WindowDataset
from newllm.devices import autocast, resolve_device, resolve_precision
from newllm.errors import UserError, flag
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.evaluation.reading import as_measured
from newllm.models import TransformerLM
from newllm.models.adaptation import adapt
from newllm.models.interop import load_trained, trained_folder, trained_shape
from newllm.paths import spelt_alike, user_path
from newllm.settings import CommonSettings, RunSettings

if TYPE_CHECKING:
    from newllm.data import PreparedData

SAME = 1e-8
"""A miss of `misses` that is the rounding of float32: two ways to compute the same."""


@dataclass(frozen=True)
class Start:
    """What a run has begun with."""

    source: str
    """Name of the folder."""
    val_loss: float
    """Validation loss in nats per token before any training as a language model."""
    undistilled_val_loss: float | None
    """The same before distillation; None without."""
    own: list[str]
    """Parameters of which the trained model had nothing."""


def check_start(settings: CommonSettings) -> None:
    """Raises UserError where there is no such model, it is of another size than the settings say, or it has read what
    they hold out."""
    if settings.start_from is None:
        return
    check_split(settings.start_from, settings)
    for name, size in trained_shape(settings.start_from).items():
        if getattr(settings, name) != size:
            given = getattr(settings, name)
            raise UserError(f"{flag(name)} is {given}: the model in {settings.start_from} has {size}")


def check_split(folder: str | Path, settings: CommonSettings) -> None:
    """Raises UserError where the text of a run is to be split otherwise than it was: into what it was trained on."""
    run_folder = user_path(str(folder)).resolve()
    if run_folder.name == "model" and not (run_folder / "config.yaml").is_file():  # the weights within a run folder
        run_folder = run_folder.parent
    config = run_folder / "config.yaml"
    if not config.is_file() or settings.data == "shakespeare":  # whose split is fixed
        return
    try:
        trained = RunSettings(**yaml.safe_load(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{config} does not hold the settings of a run of newllm") from error
    if user_path(trained.data).resolve() != user_path(settings.data).resolve():
        return
    for name in ("validation_share", "test_share", "max_documents"):
        then, now = getattr(trained, name), getattr(settings, name)
        if then != now:
            raise UserError(
                f"{flag(name)} {now}: {folder} was trained on this text with {then}, and another split "
                "holds out what it has read: leave it as it was, or give other text with --data"
            )


def start_from(model: TransformerLM, settings: RunSettings, data: PreparedData) -> Start:
    """Puts the weights of settings.start_from into the model, and distils where the settings say so.

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
    # In float32, in which it is adapted: checkpoints of the hub are often in half precision.
    source = load_trained(path).float().to(device)  # type: ignore[arg-type]
    model.to(device)  # type: ignore[arg-type]
    with as_measured(source, "float32"):
        own = adapt(source, model, ids.split(settings.eval_batch_size))
    loss, before = token_weighted_loss(model, data.splits["validation"], settings), None
    if settings.distil_tokens:
        distil(source, model, settings, data)
        loss, before = token_weighted_loss(model, data.splits["validation"], settings), loss
    return Start(spelt_alike(settings.start_from), loss, before, own)


def distil(source: TransformerLM, model: TransformerLM, settings: RunSettings, data: PreparedData) -> None:
    """Each layer that is another than the trained one learns to give what that gave for the same input.

    Its loss is the squared error over that of adding nothing, ‖f(x) − y‖² / ‖y − x‖²: 1 for a layer that passes x on.
    What it reads comes from the trained layers, so that no layer waits for another. Nothing else of the model moves;
    nor does a layer that gives the same already, as one with a memory beside the trained attention does.
    """
    T, B = settings.seq_length, settings.batch_size
    assert T is not None
    assert B is not None
    windows = WindowDataset(data.splits["train"], T)
    order = np.random.default_rng(settings.seed).permutation(len(windows))

    def batch(step: int) -> Tensor:
        chosen = [int(order[(step * B + row) % len(order)]) for row in range(B)]
        return torch.stack([windows[n]["input_ids"] for n in chosen]).to(model.device)

    pairs = zip(source.layers, model.layers, strict=True)
    others: dict[int, Any] = {n: ours for n, (theirs, ours) in enumerate(pairs) if theirs.spec != ours.spec}
    exact = dataclasses.replace(settings, precision="float32")
    with as_measured(model, exact.precision):
        missed = misses(others, layer_by_layer(source, batch(0), exact))
    others = {n: layer for (n, layer), miss in zip(others.items(), missed, strict=True) if not miss <= SAME}
    if not others:
        return
    gates = {id(gate) for layer in others.values() for gate in layer.gate_parameters()}
    groups: list[list[nn.Parameter]] = [[], []]
    for layer in others.values():
        for parameter in layer.parameters():
            groups[id(parameter) in gates].append(parameter)
    rates = (settings.distil_lr, settings.gate_lr)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True) if group], weight_decay=0.0
    )
    steps = max(1, settings.distil_tokens // (B * T))
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for step in range(steps):
        read = layer_by_layer(source, batch(step), settings)
        with autocast(model.device, resolve_precision(settings.precision, model.device)):
            loss = torch.stack(misses(others, read)).sum()
        if not loss.isfinite():
            raise UserError(f"the error of distillation is not finite at step {step + 1}: lower --distil-lr")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()


def misses(layers: dict[int, Any], read: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """‖f(x) − y‖² / ‖y − x‖² of each of the layers f, in float32, by what `layer_by_layer` has found."""
    found = []
    for n, layer in layers.items():
        x, y = read[n]
        given = layer(x, positions=torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), mask=None, state=None)
        size = (y - x).float().square().mean()
        found.append((given - y).float().square().mean() / size.clamp(min=1e-12))
    return found


def layer_by_layer(model: TransformerLM, ids: Tensor, settings: RunSettings) -> list[tuple[Tensor, Tensor]]:
    """What every layer reads and gives for ids (B, T): (B, T, D) each; of P passes through the layers (P·B, T, D)."""
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]

    def listen(layer: nn.Module, own: list[tuple[Tensor, Tensor]]) -> Any:
        return layer.register_forward_hook(lambda module, inputs, y: own.append((inputs[0], y)))

    hooks = [listen(layer, own) for layer, own in zip(model.layers, calls, strict=True)]
    try:
        with as_measured(model, settings.precision):
            model.hidden_states(ids)
    finally:
        for hook in hooks:
            hook.remove()

    def whole(parts: tuple[Tensor, ...]) -> Tensor:
        """From the calls of one layer: of true recurrence one for each token, all passes of which come first."""
        passes = sum(part.shape[1] for part in parts) // ids.shape[1]
        return torch.cat([torch.cat(parts[p::passes], dim=1) for p in range(passes)])

    return [(whole(x), whole(y)) for x, y in (zip(*own, strict=True) for own in calls)]
