"""What several of the Vintix tests need: small models far from their initial weights, and random steps."""

import torch

from newllm.vintix.model import VintixConfig, VintixModel, group_spec


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
