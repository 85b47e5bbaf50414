"""What several of the Vintix tests need: small models far from their initial weights, and random steps."""

import json

import numpy as np
import torch

from newllm.vintix.data import FORMAT, History, write_history
from newllm.vintix.environments import task_family
from newllm.vintix.model import VintixConfig, VintixModel, group_spec
from newllm.vintix.settings import CollectSettings, collect_values

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "context": 24}
SMALL |= {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "evaluations": 1, "validation_episodes": 2}


def group(observation_size=3, action_size=2, name="point"):
    return group_spec(
        name,
        [0.1 * n for n in range(observation_size)],
        [1.0 + 0.2 * n for n in range(observation_size)],
        [-1.0] * action_size,
        [1.0] * action_size,
        0.3,
    )


def small_model(**options):
    options = {"groups": [group()], "hidden_size": 32, "num_layers": 2, "num_heads": 4, "context": 64} | options
    model = VintixModel(VintixConfig(intermediate_size=24, **options)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def raw_steps(rows, steps, starts, observation_size=3, action_size=2):
    """Raw observations and rewards, and where episodes start: bool (rows, steps)."""
    observation = torch.randn(rows, steps, observation_size, dtype=torch.float64)
    reward = torch.randn(rows, steps, dtype=torch.float64)
    start = torch.zeros(rows, steps, dtype=torch.bool)
    start[:, [step for step in starts if step < steps]] = True
    start[:, 0] = True
    return observation, reward, start


def step_in_episode(start):
    steps = torch.arange(start.shape[1]).expand(start.shape)
    return steps - torch.where(start, steps, 0).cummax(dim=1).values


def inputs(model, observation, actions, reward, start):
    """What the model reads of T steps from the beginning of a history; actions (B, T, a) are those that were done."""
    spec = model.config.groups[0]
    mean, std = (torch.tensor(spec[key], dtype=torch.float64) for key in ("observation_mean", "observation_std"))
    first = torch.zeros_like(start)
    first[:, 0] = True
    shift = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], dim=1)
    return {
        "observation": (observation - mean) / std,
        "previous_action": shift,
        "previous_reward": (reward * spec["reward_scale"])[..., None],
        "episode_start": start,
        "history_start": first,
        "step_in_episode": step_in_episode(start),
    }


def write_dataset(folder, *, train_tasks=6, steps=48, noise_free=False, environment="point_reacher"):
    """Histories of random play, or of the demonstrator, with the metadata that training and evaluation read."""
    folder.mkdir(parents=True)
    counts = {"train": train_tasks, "validation": 4, "test": 5}
    settings = CollectSettings(environment=environment, **{f"{name}_tasks": count for name, count in counts.items()})
    family = task_family(settings)
    chance = np.random.default_rng(0)
    low, high = family.action_low, family.action_high

    def record(policy, task_ids, steps):
        env = family.make(task_ids, 0)
        observation, _ = env.reset(seed=0)
        columns = [[], [], [], []]
        step = np.zeros(len(task_ids), dtype=np.int32)
        for _ in range(steps):
            action = policy(observation).astype(np.float32)
            after, reward, terminated, truncated, _ = env.step(action)
            for column, value in zip(columns, (observation, action, reward.astype(np.float32), step), strict=True):
                column.append(value)
            observation, step = after, np.where(terminated | truncated, 0, step + 1).astype(np.int32)
        return [np.stack(column, axis=1) for column in columns]

    def random(observation):
        return chance.uniform(low, high, (len(observation), family.action_size))

    ids = family.task_ids("train")
    columns = record(family.demonstrator(ids) if noise_free else random, ids, steps)
    files = []
    for row in range(train_tasks):
        write_history(folder / f"{row}.h5", History(*(column[row] for column in columns)), 20)
        files.append({"file": f"{row}.h5", "task": row, "steps": steps})
    tasks = {}
    for split in counts:
        ids = family.task_ids(split)
        returns = [
            record(policy, ids, 240)[2].mean(1) * family.episode_length for policy in (random, family.demonstrator(ids))
        ]
        tasks[split] = [
            {"id": int(i), "parameters": dict(zip(family.parameter_names, family.parameters[i].tolist(), strict=True))}
            | {"random": float(r), "demonstrator": float(d), "blind": float(r)}
            for i, r, d in zip(ids, *returns, strict=True)
        ]
    metadata = {
        "format": FORMAT,
        "name": environment,
        "family": family.spec(),
        "observation_dim": family.observation_size,
        "action_dim": family.action_size,
        "action_low": low.tolist(),
        "action_high": high.tolist(),
        "observation_mean": columns[0].mean((0, 1)).tolist(),
        "observation_std": columns[0].std((0, 1)).tolist(),
        "reward_scale": 1.5,
        "tasks": tasks,
        "histories": files,
        "collect": collect_values(settings),
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def told_of(settings, **options):
    """The metadata that a run keeps of histories of these settings, as if they had been played; options of the family
    may be others."""
    family = task_family(settings)
    spec = family.spec()
    parameters = [dict(zip(family.parameter_names, row, strict=True)) for row in family.parameters.tolist()]
    returns = {"random": 0.0, "demonstrator": 1.0, "blind": 0.5}
    return {
        "name": family.name,
        "family": spec | {"options": spec["options"] | options},
        "observation_dim": family.observation_size,
        "action_dim": family.action_size,
        "action_low": family.action_low.tolist(),
        "action_high": family.action_high.tolist(),
        "observation_mean": [0.0] * family.observation_size,
        "observation_std": [1.0] * family.observation_size,
        "reward_scale": 1.0,
        "tasks": {
            split: [{"id": int(i), "parameters": parameters[i]} | returns for i in family.task_ids(split)]
            for split in family.counts
        },
        "collect": collect_values(settings),
    }
