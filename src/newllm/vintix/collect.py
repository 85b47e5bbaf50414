"""Learning histories without a learner: continuous noise distillation (arXiv 2501.19400, after arXiv 2312.12275).

A demonstrator that knows the task is drowned in noise at first and plays alone in the end,

    a = (1 − ε(n))·π(s) + ε(n)·u,   u uniform in the action box,   ε(n) = (1 − (n / ((1 − f)N))^p)^(1/p),

so that the N steps of a history look like somebody who learns the task. A model that continues such histories has to
find out, from what earned a reward so far, what the demonstrator knew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from newllm.errors import UserError
from newllm.vintix import require
from newllm.vintix.data import FORMAT, METADATA, History, read_metadata, write_history
from newllm.vintix.environments import SPLITS, Policy, TaskFamily, task_family
from newllm.vintix.settings import CollectSettings, collect_values

CURVE_POINTS = 10  # parts of a history for which the mean score is noted


def collect(settings: CollectSettings, out: Path, say: Callable[[str], None] = print) -> Path:
    """Collects the histories of a family of tasks into a new folder, and returns it.

    Called again with the same settings, it keeps what is there. The folder appears when it is complete.

    Raises:
        UserError: a value out of range, an unknown environment, a missing package, a folder that cannot be written or
            holds something else.
    """
    from newllm.training.checkpoints import complete_folder, make_folder, write_whole
    from newllm.training.locks import lock

    settings.check_collect()
    require("h5py")
    family = task_family(settings)
    out = out.absolute()
    if _collected_before(out, settings, family):
        say(f"{out} has these histories already")
        return out
    make_folder(out.parent)
    with lock(out), complete_folder(out) as staging:
        tasks = np.repeat(family.task_ids("train"), settings.histories_per_task)
        say(f"{family.name}: {len(tasks):,} histories of {settings.history_steps:,} steps")
        histories = collect_histories(family, tasks, settings)
        say(f"measuring random, demonstrator and blind play, {settings.score_episodes} episodes in each task")
        scores = {split: measure(family, split, settings) for split in SPLITS}
        (staging / "histories").mkdir()
        files = [f"histories/{index:05}.h5" for index in range(len(tasks))]
        for file, history in zip(files, histories, strict=True):
            write_history(staging / file, history, settings.group_steps)
        metadata = describe(family, histories, scores) | {
            "collect": collect_values(settings),
            "histories": [
                {"file": file, "task": int(task), "steps": len(history)}
                for file, task, history in zip(files, tasks, histories, strict=True)
            ],
        }
        write_whole(staging / METADATA, json.dumps(metadata, indent=1) + "\n")
    curve = " ".join("–" if score is None else f"{score:.2f}" for score in metadata["history_scores"])
    say(f"score of the histories from first to last tenth (0 random play, 1 the demonstrator, – no episode): {curve}")
    blind = mean_score(scores["test"], "blind")
    say(f"score in test tasks of who takes every task for the average one: {blind:.2f}")
    return out


def noise(step: np.ndarray | int, settings: CollectSettings) -> np.ndarray:
    """ε at steps n of a history: 1 at the first, 0 in the last share f."""
    noisy = (1 - settings.noise_free_share) * settings.history_steps
    progress = np.minimum(np.asarray(step) / noisy, 1.0) if noisy > 0 else np.ones(np.shape(step))
    return (1 - progress**settings.noise_power) ** (1 / settings.noise_power)


def collect_histories(family: TaskFamily, task_ids: np.ndarray, settings: CollectSettings) -> list[History]:
    """One history for each task id, all played at once."""
    chance = np.random.default_rng([settings.collect_seed, 1])
    epsilons = noise(np.arange(settings.history_steps), settings)
    demonstrator = family.demonstrator(task_ids)

    def act(observation: np.ndarray, step: int) -> np.ndarray:
        random = chance.uniform(family.action_low, family.action_high, (len(task_ids), family.action_size))
        return (1 - epsilons[step]) * demonstrator(observation) + epsilons[step] * random

    return roll_out(family, task_ids, act, settings.history_steps, settings.collect_seed)


def roll_out(
    family: TaskFamily, task_ids: np.ndarray, act: Callable[[np.ndarray, int], np.ndarray], steps: int, seed: int
) -> list[History]:
    """Plays `steps` steps in every task, episode after episode; act gets the observations (n, do) and the step."""
    env = family.make(task_ids, seed)
    tasks = len(task_ids)
    observations = np.empty((tasks, steps, family.observation_size), dtype=np.float32)
    actions = np.empty((tasks, steps, family.action_size), dtype=np.float32)
    rewards = np.empty((tasks, steps), dtype=np.float32)
    step_nums = np.empty((tasks, steps), dtype=np.int32)
    observation, _ = env.reset(seed=seed)
    step_num = np.zeros(tasks, dtype=np.int32)
    for step in range(steps):
        action = act(observation, step).astype(np.float32)
        observations[:, step], actions[:, step], step_nums[:, step] = observation, action, step_num
        observation, rewards[:, step], terminated, truncated, _ = env.step(action)
        step_num = np.where(terminated | truncated, 0, step_num + 1)
    env.close()
    return [History(*columns) for columns in zip(observations, actions, rewards, step_nums, strict=True)]


def episode_returns(history: History, episode_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of rewards of the complete episodes of a history, and the step at which each ends."""
    starts = np.flatnonzero(history.step_num == 0)
    ends = np.append(starts[1:], len(history)) - 1
    returns = np.add.reduceat(history.reward.astype(float), starts)
    complete = np.ones(len(starts), dtype=bool)
    complete[-1] = history.step_num[-1] == episode_length - 1
    return returns[complete], ends[complete]


def measure(family: TaskFamily, split: str, settings: CollectSettings) -> list[dict[str, Any]]:
    """For each task of a split its id, hidden parameters, and the mean return of random, demonstrator and blind play.

    All three begin their episodes in the same states.
    """
    task_ids = family.task_ids(split)
    chance = np.random.default_rng([settings.collect_seed, 2])

    def random(observation: np.ndarray) -> np.ndarray:
        return chance.uniform(family.action_low, family.action_high, (len(task_ids), family.action_size))

    def mean_return(policy: Policy) -> list[float]:
        steps = settings.score_episodes * family.episode_length
        histories = roll_out(family, task_ids, lambda observation, _: policy(observation), steps, SCORE_SEED)
        return [float(episode_returns(history, family.episode_length)[0].mean()) for history in histories]

    returns = {
        "random": mean_return(random),
        "demonstrator": mean_return(family.demonstrator(task_ids)),
        "blind": mean_return(family.blind(task_ids)),
    }
    return [
        {
            "id": int(task_id),
            "parameters": dict(zip(family.parameter_names, family.parameters[task_id].tolist(), strict=True)),
        }
        | {name: values[index] for name, values in returns.items()}
        for index, task_id in enumerate(task_ids)
    ]


SCORE_SEED = 2**31 - 1  # of the starting states of measured play; histories begin elsewhere


def mean_score(tasks: list[dict[str, Any]], policy: str) -> float:
    """Mean over tasks of the normalised score of 'blind', say: random is 0, the demonstrator is 1."""
    return float(np.mean([(t[policy] - t["random"]) / (t["demonstrator"] - t["random"]) for t in tasks]))


def describe(family: TaskFamily, histories: list[History], scores: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """metadata.json but for the settings and the list of files.

    Mean and standard deviation are the family's, over all of its histories: those of one task would tell of its hidden
    parameters, and a new task has none.
    """
    observations = np.stack([history.observation for history in histories]).astype(float)
    rewards = np.stack([history.reward for history in histories]).astype(float)
    std = observations.std(axis=(0, 1))
    return {
        "format": FORMAT,
        "name": family.name,
        "family": family.spec(),
        "observation_dim": family.observation_size,
        "action_dim": family.action_size,
        "action_type": "continuous",
        "action_low": family.action_low.tolist(),
        "action_high": family.action_high.tolist(),
        "episode_length": family.episode_length,
        "observation_mean": observations.mean(axis=(0, 1)).tolist(),
        "observation_std": np.where(std > 0, std, 1.0).tolist(),
        "reward_scale": float(1 / rewards.std()) if rewards.std() > 0 else 1.0,
        "history_scores": history_scores(family, histories, scores["train"]),
        "tasks": scores,
    }


def history_scores(family: TaskFamily, histories: list[History], tasks: list[dict[str, Any]]) -> list[float | None]:
    """Mean normalised score of the episodes that end in each tenth of the histories; None where none ends."""
    per_task = len(histories) // len(tasks)
    parts: list[list[float]] = [[] for _ in range(CURVE_POINTS)]
    for index, history in enumerate(histories):
        task = tasks[index // per_task]
        for value, end in zip(*episode_returns(history, family.episode_length), strict=True):
            score = (value - task["random"]) / (task["demonstrator"] - task["random"])
            parts[end * CURVE_POINTS // len(history)].append(score)
    return [float(np.mean(part)) if part else None for part in parts]


def _collected_before(out: Path, settings: CollectSettings, family: TaskFamily) -> bool:
    """Whether the folder holds the histories of these settings. Raises UserError where it holds something else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: choose an empty or new folder")
    if not (out / METADATA).is_file():
        if not any(out.iterdir()):
            return False
        raise UserError(f"--out {out} holds other files: choose an empty or new folder")
    metadata = read_metadata(out)
    if metadata["collect"] != collect_values(settings) or metadata["family"] != family.spec():
        raise UserError(f"--out {out} holds histories of other settings: choose another folder, or remove it")
    return True
