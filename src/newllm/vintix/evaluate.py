"""All measurements of trained runs on test tasks, several seeds together: evaluation.json."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from newllm.devices import machine_info, prepare_process, resolve_device
from newllm.errors import UserError
from newllm.training.checkpoints import write_whole
from newllm.vintix.data import DATA_FILE
from newllm.vintix.inference import VintixEngine
from newllm.vintix.metadata import read_family
from newllm.vintix.play import agent, curve, normalised, play, random_policy, without_memory
from newllm.vintix.runs import AGAIN as RUN_AGAIN
from newllm.vintix.runs import Run, check_alike, find_runs, load_weights
from newllm.vintix.settings import VintixEvaluateSettings, VintixSettings, training_fields

EVALUATION_FILE = "evaluation.json"
CONTROLS = ("full", "context_reset", "reward_masked")  # how a model that has seen learning plays
PLACES = 4  # decimals of stored scores
# Added to --evaluate-seed. Row i of an environment may begin as seed + i says, so it lies far beyond all seeds that
# histories, measured play and validation begin with: test tasks begin in states of their own.
EVALUATION_SEED = 2**32


def evaluate(
    folders: list[Path], settings: VintixSettings, out: Path, command: str, say: Callable[[str], None] = print
) -> Path:
    """Plays the test tasks with every run of the folders; writes out/evaluation.json and returns its path.

    Raises:
        UserError: no runs, none that has seen learning, or runs that differ in more than their seeds.
    """
    settings.check_evaluate()
    transformers.utils.logging.disable_progress_bar()
    prepare_process(settings.threads)
    runs = find_runs(folders, say)
    full = [run for run in runs if not run.demonstrator_only]
    if not full:
        raise UserError(
            f"{folders[0]}: only runs on demonstrator-only histories there: train one with --seeds 0 as well"
        )
    check_alike(runs)
    families = [_evaluate_family(runs, group, settings, say) for group in range(len(full[0].data))]
    results = {
        "command": command,
        "machine": machine_info(),
        "settings": {f.name: getattr(settings, f.name) for f in fields(VintixEvaluateSettings)},
        "config": {name: full[0].config[name] for name in training_fields()},
        "runs": [run.summary() for run in runs],
        "families": families,
    }
    path = out / EVALUATION_FILE
    write_whole(path, json.dumps(results) + "\n")
    return path


def _evaluate_family(
    runs: list[Run], group: int, settings: VintixSettings, say: Callable[[str], None]
) -> dict[str, Any]:
    """Curves of all ways to play one family's test tasks, and what the report draws of the first model's play."""
    metadata = runs[0].data[group]
    family = read_family(metadata, runs[0].folder / DATA_FILE, RUN_AGAIN)
    task_ids, tasks, seed = family.task_ids("test"), metadata["tasks"]["test"], settings.evaluate_seed
    start = EVALUATION_SEED + seed
    scores: dict[str, list[np.ndarray]] = {}
    seeds: dict[str, list[int]] = {}
    strips: list[dict[str, Any]] = []
    for run in runs:
        say(f"{metadata['name']}: {run.folder.name} plays {len(task_ids)} test tasks")
        model = load_weights(run).to(resolve_device(settings.device))  # type: ignore[arg-type]
        for control in CONTROLS[:1] if run.demonstrator_only else CONTROLS:
            engine = VintixEngine(model, len(task_ids), group, settings.evaluate_context)
            precision = str(engine.dtype).removeprefix("torch.")
            options = {} if control == "full" else {control: True}
            recorded = settings.strip_tasks if control == "full" and not scores else 0
            played = play(agent(engine, **options), family, task_ids, settings.episodes, start, recorded)
            name = "demonstrator_only" if run.demonstrator_only else control
            scores.setdefault(name, []).append(normalised(played.returns, tasks))
            seeds.setdefault(name, []).append(run.seed)
            for (row, episode), observations in played.observations.items():
                strips.append(
                    {
                        "task": int(task_ids[row]),
                        "parameters": family.parameters[task_ids[row]].tolist(),
                        "episode": episode + 1,
                        "score": round(float(scores[name][-1][row, episode]), PLACES),
                        "observations": np.round(observations, PLACES).tolist(),
                    }
                )
    for name, policy in {
        "random": random_policy(family, zlib.crc32(b"random") + seed),
        "blind": family.blind(task_ids),
        "demonstrator": family.demonstrator(task_ids),
    }.items():
        played = play(without_memory(policy), family, task_ids, settings.episodes, start)
        scores[name] = [normalised(played.returns, tasks)]
        seeds[name] = []
    return {
        "name": metadata["name"],
        "options": family.options,
        "tasks": len(task_ids),
        "collect": metadata["collect"],
        "precision": precision,
        "parameter_names": list(family.parameter_names),
        "curves": {
            name: {"seeds": seeds[name]} | curve(np.stack(values), settings.resamples, seed)
            for name, values in scores.items()
        },
        "scores": {name: np.round(np.stack(values), PLACES).tolist() for name, values in scores.items()},
        "strips": sorted(strips, key=lambda strip: (strip["task"], strip["episode"])),
    }
