"""`newllm adapt`: a comparison that starts from a trained model, with the settings that fit it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from newllm.commands.folders import run_config
from newllm.settings import DataSettings, ExperimentSettings, ShapeSettings

OTHER_LAYERS = ["mla_geometric", "mqa", "v_dproj"]
WITH_MEMORY = ["infini", "infini_adapter"]
SEGMENT = 128  # tokens of a segment of theirs, than which windows must be longer


@dataclass(kw_only=True)
class AdaptSettings(ExperimentSettings):
    """Size and tokenizer are those of the model in FOLDER, of a run also text, windows, scale and plugin."""

    models: list[str] = field(default_factory=list)
    """Presets or layer types to put the weights into; the first is the baseline. Default: the trained model as it is,
    mla_geometric, mqa, v_dproj, infini and infini_adapter; these two with shorter segments where windows are short. Of
    a model whose MLPs read what attention has added to: itself and mqa."""
    name: str = "adapt"
    """Title of the report."""


def settings_for(folder: str) -> dict[str, Any]:
    """Size, tokenizer and text of the trained model; what it is compared with, and a name."""
    from newllm.models.interop import trained_folder, trained_residuals, trained_shape

    trained, shape = run_config(folder), trained_shape(folder)
    kept = {f.name for cls in (ShapeSettings, DataSettings) for f in dataclasses.fields(cls)} | {"scale", "plugin"}
    of_run = {name: value for name, value in trained.items() if name in kept}
    window = trained.get("seq_length")
    shorter = f":segment_length={max(1, window // 4)}" if window is not None and window <= SEGMENT else ""
    with_memory = [name + shorter for name in WITH_MEMORY]
    models = list(dict.fromkeys([trained.get("model", "pythia"), *OTHER_LAYERS, *with_memory]))
    if not all(trained_residuals(folder)):  # which only layers of type pythia can have
        sequential = "parallel_residual=false"
        models = [trained.get("model", f"pythia:{sequential}"), f"mqa:{sequential}"]
    path, _ = trained_folder(folder)
    of_model = shape | {"tokenizer": str(path), "start_from": folder}
    return of_run | of_model | {"models": models}
