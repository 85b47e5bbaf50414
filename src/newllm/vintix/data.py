"""Learning histories on disk, and the windows of them a model is trained on.

A dataset is a folder: one HDF5 file per history and `metadata.json` beside them. A history file holds groups named by
their first and last step, '0-9999', '10000-19999', …, each with

    proprio_observation (n, do) float32, action (n, da) float32, reward (n,) float32, step_num (n,) int32.

Row t: the observation, the action taken there, the reward it earned, and t's step within its episode.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from newllm.errors import UserError
from newllm.vintix import require
from newllm.vintix.metadata import flaw

METADATA = "metadata.json"
DATA_FILE = "data.json"
"""In the folder of a run: the metadata of what it was trained on, but for the list of histories."""
FORMAT = 1
"""Raised whenever older folders could not be read as they are."""
COLUMNS = {"proprio_observation": np.float32, "action": np.float32, "reward": np.float32, "step_num": np.int32}
KEYS = tuple(COLUMNS)


@dataclass
class History:
    """One learning history of N steps."""

    observation: np.ndarray
    """(N, do) float32, as the environment gave it."""
    action: np.ndarray
    """(N, da) float32, in the units of the action box."""
    reward: np.ndarray
    """(N,) float32, unscaled."""
    step_num: np.ndarray
    """(N,) int32, step within the episode; 0 begins one."""

    def __len__(self) -> int:
        return len(self.reward)


def write_history(path: Path, history: History, group_steps: int) -> None:
    """Writes one history file."""
    columns = dict(zip(KEYS, (history.observation, history.action, history.reward, history.step_num), strict=True))
    with require("h5py").File(path, "w", libver="latest") as file:  # whose headers have checksums
        for first in range(0, len(history), group_steps):
            last = min(first + group_steps, len(history)) - 1
            group = file.create_group(f"{first}-{last}")
            for key, column in columns.items():
                group.create_dataset(key, data=column[first : last + 1], fletcher32=True)  # so that damage shows


def read_history(path: Path, steps: int, observation_size: int, action_size: int) -> History:
    """A whole history. Raises UserError, with the file's name, unless all of its steps are there and sound."""
    h5py = require("h5py")
    try:
        with h5py.File(path, "r") as file:
            names = sorted(file, key=_first_step)
            parts = [{key: file[name][key][:] for key in KEYS} for name in names]
        firsts = [_first_step(name) for name in names]
        columns = {key: np.concatenate([part[key] for part in parts]) for key in KEYS}
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {AGAIN}") from None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:  # damage shows in many ways
        raise UserError(f"{path}: broken: {error}; {AGAIN}") from None
    if names != [f"{first}-{end - 1}" for first, end in zip([0, *firsts[1:]], [*firsts[1:], steps], strict=True)]:
        raise UserError(
            f"{path}: incomplete: steps are missing between those of the groups {', '.join(names)}; {AGAIN}"
        )
    shapes = dict(zip(KEYS, ((steps, observation_size), (steps, action_size), (steps,), (steps,)), strict=True))
    for key, shape in shapes.items():
        if columns[key].dtype != COLUMNS[key]:
            raise UserError(f"{path}: {key} is {columns[key].dtype}, not {np.dtype(COLUMNS[key])}; {AGAIN}")
        if columns[key].shape != shape:
            raise UserError(f"{path}: {key} has the shape {columns[key].shape}, not {shape}; {AGAIN}")
        if not np.isfinite(columns[key]).all():
            raise UserError(f"{path}: {key} has values that are not finite; {AGAIN}")
    step = columns["step_num"]
    if step[0] != 0 or not ((step[1:] == 0) | (step[1:] == step[:-1] + 1)).all():
        raise UserError(f"{path}: step_num does not count the steps of episodes from 0; {AGAIN}")
    return History(*(columns[key] for key in KEYS))


AGAIN = "collect the histories again into a new folder"


def _first_step(name: str) -> int:
    return int(name.split("-")[0])


@dataclass
class Histories:
    """A collected dataset in memory: H histories of N steps each, of one family of tasks."""

    metadata: dict[str, Any]
    """metadata.json; among it 'name', 'family' (for `metadata.read_family`), 'observation_dim', 'action_dim',
    'action_low', 'action_high', 'observation_mean', 'observation_std', 'reward_scale', and 'tasks': for each split a
    list of {'id', 'parameters', 'random', 'demonstrator', 'blind'}, the last three being mean returns."""
    observation: np.ndarray
    """(H, N, do) float32, normalised by the family's mean and standard deviation."""
    action: np.ndarray
    """(H, N, da) float32."""
    reward: np.ndarray
    """(H, N) float32, times reward_scale."""
    step_num: np.ndarray
    """(H, N) int32."""
    target: np.ndarray | None = None
    """(H, N, da) float32, what a model is to answer at each step; None: the action that was taken."""

    @property
    def name(self) -> str:
        return self.metadata["name"]


def read_metadata(folder: Path) -> dict[str, Any]:
    """metadata.json of a dataset. Raises UserError where the folder is none, or a value makes no sense."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no folder with a {METADATA}; make histories with newllm vintix collect") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: broken: not valid JSON; {AGAIN}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not the metadata of histories in format {FORMAT}; {AGAIN}")
    if (what := flaw(metadata, histories=True)) is not None:
        raise _broken(folder, what)
    return metadata


def read_histories(folder: Path) -> Histories:
    """Reads and checks a whole dataset. Raises UserError with the name of a broken, missing or incomplete file."""
    metadata = read_metadata(folder)
    sizes = metadata["observation_dim"], metadata["action_dim"]
    files = [(folder / entry["file"], entry["steps"]) for entry in metadata["histories"]]
    lengths = sorted({steps for _, steps in files})
    if len(lengths) != 1:
        what = f"histories of different lengths, from {lengths[0]} to {lengths[-1]} steps"
        raise _broken(folder, f"{what}, where all must be equally long")
    mean, std = (np.array(metadata[key], dtype=np.float32) for key in ("observation_mean", "observation_std"))
    scale = np.float32(metadata["reward_scale"])
    histories = [read_history(path, steps, *sizes) for path, steps in files]
    return Histories(
        metadata=metadata,
        observation=(np.stack([history.observation for history in histories]) - mean) / std,
        action=np.stack([history.action for history in histories]),
        reward=np.stack([history.reward for history in histories]) * scale,
        step_num=np.stack([history.step_num for history in histories]),
    )


def check_context(context: int, name: str, steps: int) -> None:
    """Raises UserError where the histories of a family, of so many steps, are shorter than a context."""
    if steps < context:
        raise UserError(
            f"--context is {context}: the histories of {name} have {steps} steps; choose a shorter context, or collect "
            "with more --history-steps"
        )


def _broken(folder: Path, what: str) -> UserError:
    return UserError(f"{folder / METADATA}: broken: {what}; {AGAIN}")


class HistoryDataset:
    """Windows of `context` consecutive steps of one history, at random offsets; a map-style dataset for torch.

    Item i is the same whenever it is asked for: it depends on the seed and i alone. With several datasets, `block`
    consecutive items are of one group, so that a micro-batch can be stacked.
    """

    def __init__(
        self,
        datasets: list[Histories],
        context: int,
        seed: int,
        length: int | None = None,
        block: int = 1,
        start_share: float = 0.0,
    ) -> None:
        """
        Args:
            length: how many items there are; by default as many as cover the histories once.
            start_share: share of the windows that begin where their history does.

        Raises:
            UserError: histories shorter than the context.
        """
        self.datasets, self.context, self.seed, self.block = datasets, context, seed, block
        self.start_share = start_share
        for data in datasets:
            check_context(context, data.name, data.reward.shape[1])
        steps = np.array([data.reward.size for data in datasets])
        self.shares = steps / steps.sum()
        self.length = max(1, int(steps.sum()) // context) if length is None else length

    def __len__(self) -> int:
        return self.length

    def group(self, index: int) -> int:
        """Index of the dataset that item `index` is taken from; datasets are taken by their number of steps."""
        if len(self.datasets) == 1:  # of which nothing need be drawn: half the time of an item
            return 0
        chance = np.random.default_rng([self.seed, 1, index // self.block])
        return int(chance.choice(len(self.datasets), p=self.shares))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        observation (T, do); action (T, da), the target of the model; previous_action (T, da) and previous_reward
        (T, 1), those of the step before, across episodes too, zeros before the history's first; float32.
        episode_start, history_start (T,) bool; step_in_episode (T,) int64; group: int.
        """
        if not 0 <= index < self.length:
            raise IndexError(index)
        group = self.group(index)
        data = self.datasets[group]
        chance = np.random.default_rng([self.seed, 0, index])
        history = int(chance.integers(data.reward.shape[0]))
        at_start = chance.random() < self.start_share
        first = 0 if at_start else int(chance.integers(data.reward.shape[1] - self.context + 1))
        rows = slice(first, first + self.context)
        step = data.step_num[history, rows].astype(np.int64)
        return {
            "observation": data.observation[history, rows],
            "action": (data.action if data.target is None else data.target)[history, rows],
            "previous_action": _shifted(data.action[history], first, self.context),
            "previous_reward": _shifted(data.reward[history, :, None], first, self.context),
            "episode_start": step == 0,
            "history_start": np.arange(first, first + self.context) == 0,
            "step_in_episode": step,
            "group": group,
        }


def _shifted(column: np.ndarray, first: int, length: int) -> np.ndarray:
    """Rows first − 1 … first + length − 2 of (N, d); row −1 is zero."""
    if first > 0:
        return column[first - 1 : first - 1 + length]
    return np.concatenate([np.zeros_like(column[:1]), column[: length - 1]])
