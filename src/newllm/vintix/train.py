"""Training of Vintix models, each in a run folder of its own.

The loss says little: its floor is the noise that was injected into the histories. So a run is measured by what it is
for: the model plays validation tasks, of the region of the training tasks but without histories, and the weights that
score best there are kept. Test tasks are never seen here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from newllm.devices import prepare_process, resolve_device, resolve_precision
from newllm.training.checkpoints import (
    claim_run_folder,
    complete_folder,
    explaining_full_disk,
    remove_except,
    training_result,
    write_result,
    write_whole,
)
from newllm.training.locks import lock
from newllm.vintix.data import AGAIN, DATA_FILE, METADATA, Histories, HistoryDataset, read_histories
from newllm.vintix.environments import TaskFamily
from newllm.vintix.inference import VintixEngine
from newllm.vintix.metadata import read_family
from newllm.vintix.model import GROUP_KEYS, VintixConfig, VintixModel
from newllm.vintix.play import agent, interquartile_mean, normalised, play
from newllm.vintix.settings import VintixModelSettings, VintixRun, model_values
from newllm.vintix.trainer import VintixProgress, VintixTrainer

VALIDATION_SEED = 1_000_003  # of the starting states of validation tasks: the same at every evaluation of every run


@dataclass(frozen=True)
class VintixTrainResult:
    """What a finished run says about itself."""

    steps: int
    parameters: int
    best_score: float
    """In-context score on the validation tasks of the weights that were kept."""
    best_step: int
    seconds: float
    """Wall time of all steps, evaluations and checkpoints, over every continuation of the run."""


def train(
    run: VintixRun,
    data_folders: list[Path],
    folder: Path,
    on_progress: Callable[[VintixProgress], None] | None = None,
) -> VintixTrainResult:
    """Trains one model on the histories of the folders, or continues where an interrupted call stopped.

    folder receives config.yaml, data.json (what evaluation has to know of the data), metrics.jsonl, model/ (best
    weights by play, with the statistics that turn raw numbers into the model's) and result.json. A second call returns
    what the first did. Where precision is 'auto', config.yaml says what it was here.
    Raises UserError for histories that are broken or shorter than the context, where a package is missing, when the
    loss is not finite or the disk is full; KeyboardInterrupt (state saved) on Ctrl-C.
    """
    folder = folder.resolve()  # a folder that is moved aside may be the one we are in
    run = replace(run, precision=resolve_precision(run.precision, resolve_device(run.device)))
    data = [read_histories(path) for path in data_folders]
    families = [
        read_family(histories.metadata, path / METADATA, AGAIN)
        for histories, path in zip(data, data_folders, strict=True)
    ]
    if run.target == "demonstrator":
        for histories, family in zip(data, families, strict=True):
            histories.target = demonstrated(histories, family)
    # What cannot be trained on or played is refused here, before the folder of a finished run might be moved aside.
    windows_per_step = run.batch_size * run.gradient_accumulation
    windows = HistoryDataset(
        data, run.context, run.seed, run.steps * windows_per_step, block=run.batch_size, start_share=run.start_share
    )
    facts = [{key: value for key, value in histories.metadata.items() if key != "histories"} for histories in data]
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    with lock(folder), explaining_full_disk(folder):
        result = claim_run_folder(folder, run, fingerprint)  # type: ignore[arg-type]
        if "training" not in result:
            write_whole(folder / DATA_FILE, json.dumps(facts))
            result["training"] = asdict(_train(run, windows, families, folder, on_progress))
            write_result(folder, result)
        remove_except(folder, set())
    return training_result(VintixTrainResult, folder, result)


def _train(
    run: VintixRun,
    windows: HistoryDataset,
    families: list[TaskFamily],
    folder: Path,
    on_progress: Callable[[VintixProgress], None] | None,
) -> VintixTrainResult:
    transformers.utils.logging.disable_progress_bar()
    prepare_process(run.threads)
    transformers.set_seed(run.seed)
    data = windows.datasets
    model = new_model(run, data)
    trainer = VintixTrainer(
        run,
        lambda played: in_context_score(played, data, families, run.validation_episodes),
        on_progress,
        folder,
        model=model,
        train_dataset=windows,  # type: ignore[arg-type]
        data_collator=stack,
    )
    state = trainer.finish()
    with complete_folder(folder / "model") as staging:
        model.save_pretrained(staging)
    return VintixTrainResult(
        steps=state.global_step,
        parameters=model.num_parameters(),
        best_score=state.best_metric,  # type: ignore[arg-type]
        best_step=state.best_global_step,  # type: ignore[arg-type]
        seconds=state.log_history[-1]["seconds"],
    )


def demonstrated(histories: Histories, family: TaskFamily) -> np.ndarray:
    """(H, N, da) what the demonstrator of each history's task would have done, without noise, at each of its steps."""
    metadata = histories.metadata
    mean, std = (np.array(metadata[key], dtype=np.float32) for key in ("observation_mean", "observation_std"))
    act = family.demonstrator(np.array([entry["task"] for entry in metadata["histories"]]))
    steps = [act(observation * std + mean) for observation in histories.observation.swapaxes(0, 1)]
    return np.stack(steps, axis=1).astype(np.float32)


def new_model(settings: VintixModelSettings, data: list[Histories]) -> VintixModel:
    """An untrained model with a group for each dataset."""
    statistics = GROUP_KEYS[1:]
    groups = [{"name": histories.name} | {key: histories.metadata[key] for key in statistics} for histories in data]
    return VintixModel(VintixConfig(groups=groups, **model_values(settings)))


def stack(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Windows of one group to a batch, as `VintixModel.forward` takes it."""
    names = [name for name in items[0] if name != "group"]
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in names} | {
        "group": items[0]["group"]
    }


def in_context_score(model: VintixModel, data: list[Histories], families: list[TaskFamily], episodes: int) -> float:
    """Inter-quartile mean over the validation tasks of the normalised score, in the second half of the episodes."""
    scores = []
    for group, (histories, family) in enumerate(zip(data, families, strict=True)):
        task_ids = family.task_ids("validation")
        engine = VintixEngine(model, len(task_ids), group)
        returns = play(agent(engine), family, task_ids, episodes, VALIDATION_SEED).returns
        later = normalised(returns, histories.metadata["tasks"]["validation"])[:, episodes // 2 :]
        scores.append(later.mean(axis=1))
    return float(interquartile_mean(np.concatenate(scores)))
