"""All measurements of trained runs on test tasks, several seeds together: evaluation.json."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import yaml

from newllm.settings import UserError
from newllm.training.checkpoints import read_result, write_whole
from newllm.training.devices import machine_info, resolve_device, set_threads
from newllm.vintix.environments import from_spec
from newllm.vintix.inference import VintixEngine
from newllm.vintix.model import VintixModel
from newllm.vintix.play import agent, curve, normalised, play, random_policy, without_memory
from newllm.vintix.settings import VintixEvaluateSettings, VintixSettings

EVALUATION_FILE = "evaluation.json"
CONTROLS = ("full", "context_reset", "reward_masked")  # how a model that has seen learning plays
PLACES = 4  # decimals of stored scores
# Added to --evaluate-seed. Row i of an environment may begin as seed + i says, so it lies far beyond all seeds that
# histories, measured play and validation begin with: test tasks begin in states of their own.
EVALUATION_SEED = 2**32


@dataclass(frozen=True)
class Run:
    """A finished run folder."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    data: list[dict[str, Any]]
    """For each group of the model, the metadata of its dataset but for the histories."""

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def demonstrator_only(self) -> bool:
        return self.config["demonstrator_only"]

    def summary(self) -> dict[str, Any]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        keys = ("step", "train_loss", "score")
        return {
            "folder": self.folder.name,
            "seed": self.seed,
            "demonstrator_only": self.demonstrator_only,
            "families": [data["name"] for data in self.data],
            "curve": [{key: line[key] for key in keys if key in line} for line in lines],
            **self.result["training"],
        }


def find_runs(folders: list[Path]) -> list[Run]:
    """The finished runs in these folders, each a run folder or a folder of them; by seed.

    Raises:
        UserError: no such folder, or no finished run in it.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give what newllm vintix train has written")
        inside = sorted(path.parent for path in folder.glob("*/result.json"))
        found = [
            path for path in [folder, *inside] if "training" in read_result(path) and (path / "data.json").is_file()
        ]
        if not found:
            raise UserError(f"{folder}: no finished run of newllm vintix train there")
        for path in (path for path in found if "~old" not in path.name):
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
            runs.append(Run(path, config, read_result(path), json.loads((path / "data.json").read_text())))
    return sorted(runs, key=lambda run: (run.demonstrator_only, run.seed))


def evaluate(
    folders: list[Path], settings: VintixSettings, out: Path, command: str, say: Callable[[str], None] = print
) -> Path:
    """Plays the test tasks with every run of the folders; writes out/evaluation.json and returns its path.

    Raises:
        UserError: no runs, none that has seen learning, or runs that have learned different tasks under one name.
    """
    settings.check_evaluate()
    transformers.utils.logging.disable_progress_bar()
    set_threads(settings)  # type: ignore[arg-type]
    runs = find_runs(folders)
    full = [run for run in runs if not run.demonstrator_only]
    if not full:
        raise UserError(
            f"{folders[0]}: only runs on demonstrator-only histories there: train one with --seeds 0 as well"
        )
    families = []
    for metadata in {data["name"]: data for run in full for data in run.data}.values():
        same = [data for run in runs for data in run.data if data["name"] == metadata["name"]]
        if any(data["family"] != metadata["family"] for data in same):
            raise UserError(f"the runs have learned different tasks of {metadata['name']}: evaluate them apart")
        families.append(_evaluate_family(runs, metadata, settings, say))
    results = {
        "command": command,
        "machine": machine_info(),
        "settings": {f.name: getattr(settings, f.name) for f in fields(VintixEvaluateSettings)},
        "config": full[0].config,
        "runs": [run.summary() for run in runs],
        "families": families,
    }
    path = out / EVALUATION_FILE
    write_whole(path, json.dumps(results) + "\n")
    return path


def _evaluate_family(
    runs: list[Run], metadata: dict[str, Any], settings: VintixSettings, say: Callable[[str], None]
) -> dict[str, Any]:
    """Curves of all ways to play one family's test tasks, and what the report draws of the first model's play."""
    family = from_spec(metadata["family"])
    task_ids, tasks, seed = family.task_ids("test"), metadata["tasks"]["test"], settings.evaluate_seed
    start = EVALUATION_SEED + seed
    scores: dict[str, list[np.ndarray]] = {}
    seeds: dict[str, list[int]] = {}
    strips: list[dict[str, Any]] = []
    for run in runs:
        names = [data["name"] for data in run.data]
        if metadata["name"] not in names:
            continue
        say(f"{metadata['name']}: {run.folder.name} plays {len(task_ids)} test tasks")
        model = VintixModel.from_pretrained(run.folder / "model").to(resolve_device(settings))  # type: ignore[arg-type]
        for control in CONTROLS[:1] if run.demonstrator_only else CONTROLS:
            engine = VintixEngine(model, len(task_ids), names.index(metadata["name"]), settings.evaluate_context)
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
        "parameter_names": list(family.parameter_names),
        "curves": {
            name: {"seeds": seeds[name]} | curve(np.stack(values), settings.resamples, seed)
            for name, values in scores.items()
        },
        "scores": {name: np.round(np.stack(values), PLACES).tolist() for name, values in scores.items()},
        "strips": sorted(strips, key=lambda strip: (strip["task"], strip["episode"])),
    }
