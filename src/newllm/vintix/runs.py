"""Finished run folders, and whether they may be measured together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from newllm.errors import UserError, first_line, flag
from newllm.resolution import fits
from newllm.training.checkpoints import read_result
from newllm.vintix.data import DATA_FILE
from newllm.vintix.metadata import flaw
from newllm.vintix.settings import VintixRun, training_fields

if TYPE_CHECKING:
    from newllm.vintix.model import VintixModel


AGAIN = "move it away, and newllm vintix train makes it again"


@dataclass(frozen=True)
class Run:
    """A finished run folder."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    data: list[dict[str, Any]]
    """For each group of the model, the metadata of its dataset but for the histories."""
    curve: list[dict[str, Any]]
    """The lines of metrics.jsonl."""

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def demonstrator_only(self) -> bool:
        return self.config["demonstrator_only"]

    @property
    def families(self) -> list[str]:
        return [data["name"] for data in self.data]

    def summary(self) -> dict[str, Any]:
        keys = ("step", "train_loss", "score")
        return {
            "folder": self.folder.name,
            "seed": self.seed,
            "demonstrator_only": self.demonstrator_only,
            "families": self.families,
            "curve": [{key: line[key] for key in keys if key in line} for line in self.curve],
            **self.result["training"],
        }


def find_runs(folders: list[Path], say: Callable[[str], None]) -> list[Run]:
    """The finished runs in these folders, each a run folder or a folder of them; by seed. Says what it passes over.

    Raises:
        UserError: no such folder, or no finished run in it.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give what newllm vintix train has written")
        inside = [folder] if read_result(folder) else sorted(path.parent for path in folder.glob("*/result.json"))
        found, passed = [], []
        for path in inside:
            result = read_result(path)
            if result.get("model") != VintixRun().model:
                continue
            if path != folder and "~old" in path.name:
                passed.append(
                    f"{path.name} (moved aside for a run with other settings; name its folder to evaluate it)"
                )
            elif "training" not in result:
                passed.append(f"{path.name} (not finished; the same newllm vintix train continues it)")
            else:
                found.append(_read_run(path, result))
        if not found:
            only = f", only {', '.join(passed)}" if passed else ""
            raise UserError(f"{folder}: no finished run of newllm vintix train there{only}")
        for line in passed:
            say(f"{folder}: passes over {line}")
        runs += found
    return sorted(runs, key=lambda run: (run.demonstrator_only, run.seed))


def _read_run(folder: Path, result: dict[str, Any]) -> Run:
    """Raises UserError for files that training has not left so."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        data = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
        curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {first_line(error)}") from error
    settings = get_type_hints(VintixRun)
    if not isinstance(config, dict) or config.keys() != settings.keys():
        raise _damaged(folder, "config.yaml does not hold all settings")
    if wrong := [name for name, hint in settings.items() if not fits(config[name], hint)]:
        raise _damaged(folder, f"config.yaml: {wrong[0]} is {config[wrong[0]]!r}, which is no value of it")
    if not isinstance(data, list) or not data or not all(isinstance(group, dict) for group in data):
        raise _damaged(folder, f"{DATA_FILE} is no list of objects")
    for what in filter(None, (flaw(group, histories=False) for group in data)):
        raise _damaged(folder, f"{DATA_FILE}: {what}")
    if not all(isinstance(line, dict) for line in curve):
        raise _damaged(folder, "metrics.jsonl has lines that are no objects")
    if not isinstance(result["training"], dict):
        raise _damaged(folder, "result.json does not say how the training ended")
    return Run(folder, config, result, data, curve)


def load_weights(run: Run) -> VintixModel:
    """The trained model of a run. Raises UserError for a damaged file."""
    from newllm.vintix.model import VintixModel

    try:
        return VintixModel.from_pretrained(run.folder / "model")
    except Exception as error:  # safetensors and transformers raise many kinds
        raise _damaged(run.folder, f"model: {first_line(error)}") from error


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} is damaged ({what}): {AGAIN}")


def check_alike(runs: list[Run]) -> None:
    """Raises UserError unless runs differ in their seeds alone, and controls in the noise of their histories as well.

    A curve says what one way of training gives, and its interval what another seed might give.
    """
    for run in runs[1:]:
        if difference := _difference(runs[0], run):
            raise UserError(
                f"{difference}: what is measured together may differ in seeds alone; train one of them again with the "
                "other's settings, or name only run folders that belong together"
            )
    for before, run in itertools.pairwise(runs):
        if (before.seed, before.demonstrator_only) == (run.seed, run.demonstrator_only):
            what = "controls of seed" if run.demonstrator_only else "of seed"
            raise UserError(f"{before.folder} and {run.folder} are both {what} {run.seed}: name one run of each seed")


def _difference(run: Run, other: Run) -> str | None:
    """The first thing in which two runs differ, in words."""
    if run.families != other.families:
        learned, too = (", ".join(names) for names in (run.families, other.families))
        return f"{run.folder} has learned {learned}, {other.folder} {too}"
    for name in training_fields():
        value, another = run.config[name], other.config[name]
        if value != another and name != "device":
            return f"{flag(name)} is {value} in {run.folder}, {another} in {other.folder}"
    for data, more in zip(run.data, other.data, strict=True):
        for name, value in data["collect"].items():
            another = more["collect"][name]
            if value != another and not (other.demonstrator_only and name == "noise_free_share"):
                return f"{flag(name)} is {value} in the histories of {run.folder}, {another} in those of {other.folder}"
        if data["family"] != more["family"]:
            return f"{run.folder} and {other.folder} have learned different tasks of {data['name']}"
    return None
