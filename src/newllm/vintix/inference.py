"""Acting with a Vintix model: raw observations and rewards in, raw actions out, one step of all environments at a time.

Keys and values of the last `context` steps lie in a ring: step n is written into slot n mod C over step n − C, and
nothing is ever moved. Attention does not care in which order the slots stand; ALiBi wants only the distance to each,
which the number of the step in a slot tells. All rows share the ring's position. A row whose task begins anew forgets
by ignoring the slots written before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from newllm.errors import UserError
from newllm.vintix.model import VintixModel


class RingCache:
    """Keys and values of the last C steps of B rows, for every layer.

    Allocated whole at the start, so that a step takes no longer than another once the ring is full.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, rows * heads, capacity, head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.rows, self.heads, self.capacity = rows, heads, capacity
        self.step = -1  # number of the step being read
        self.first = torch.zeros(rows, dtype=torch.long, device=device)  # each row's first step that still counts
        self.bias: Tensor | None = None

    def advance(self, slopes: Tensor) -> None:
        """Begins the next step: −m_h · distance of each used slot, −∞ where a row has forgotten; for all layers."""
        self.step += 1
        used = min(self.step + 1, self.capacity)
        slots = torch.arange(used, device=self.first.device)
        distance = (self.step - slots) % self.capacity  # of the newest step in each slot
        bias = -slopes[:, None] * distance  # (H, used)
        self.bias = bias.repeat(self.rows, 1)[:, None]  # (B·H, 1, used)
        if bool((self.first > self.step - used + 1).any()):
            forgotten = self.step - distance < self.first[:, None]  # (B, used)
            self.bias = self.bias.masked_fill(forgotten.repeat_interleave(self.heads, 0)[:, None], float("-inf"))

    def forget(self, rows: Tensor) -> None:
        """Rows (n,) int64 see nothing of what they have read.

        It is overwritten as well: a number that is not finite would come through a weight of 0.
        """
        self.first[rows] = self.step + 1
        for stored in (self.keys, self.values):
            stored.unflatten(1, (self.rows, self.heads))[:, rows] = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, 1, d) of the step being read; the mixed values (B, H, 1, d)."""
        slot, used, d = self.step % self.capacity, min(self.step + 1, self.capacity), q.shape[3]
        self.keys[layer, :, slot], self.values[layer, :, slot] = k.reshape(-1, d), v.reshape(-1, d)
        keys, values = self.keys[layer, :, :used], self.values[layer, :, :used]
        assert self.bias is not None
        scores = torch.baddbmm(self.bias, q.reshape(-1, 1, d), keys.transpose(1, 2), alpha=d**-0.5)
        return torch.bmm(scores.softmax(dim=-1), values).view(q.shape)

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class VintixEngine:
    """A model that acts in B environments at once, each row with a memory of its own.

    Args:
        model: put into evaluation mode, which is how it acts.
        rows: environments B.
        group: which of the model's groups their spaces are.
        context: steps C that are remembered; default the model's own.
    """

    def __init__(self, model: VintixModel, rows: int, group: int = 0, context: int | None = None) -> None:
        config = model.config
        self.model, self.rows, self.group = model.eval(), rows, group
        self.context = config.context if context is None else context
        if self.context < 1:
            raise UserError(f"context is {self.context}: at least 1 step, the present one, must be seen")
        spec = config.groups[group]
        self.dtype, self.device = model.norm.weight.dtype, model.norm.weight.device
        self.mean, self.std, self.low, self.high = (
            self._tensor(spec[key]) for key in ("observation_mean", "observation_std", "action_low", "action_high")
        )
        self.reward_scale = spec["reward_scale"]
        head_size = config.hidden_size // config.num_heads
        self.ring = RingCache(
            config.num_layers, rows, config.num_heads, self.context, head_size, self.dtype, self.device
        )
        self.slopes = model.slopes(self.device).to(self.dtype)
        self.action = torch.zeros(rows, len(spec["action_low"]), dtype=self.dtype, device=self.device)
        self.step_in_episode = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.fresh = torch.ones(rows, dtype=torch.bool, device=self.device)

    @property
    def lengths(self) -> Tensor:
        """(B,) steps each row remembers."""
        return (self.ring.step + 1 - self.ring.first).clamp(max=self.context)

    def reset(self, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Rows forget everything: their next observation is the first of a new task.

        Args:
            rows: their numbers, or a mask (B,) bool, as the ends of episodes come from an environment; None for all.
        """
        chosen = np.arange(self.rows) if rows is None else np.asarray(rows)
        index = torch.as_tensor(np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64))
        self.ring.forget(index)
        self.fresh[index] = True

    @torch.no_grad()
    def act(
        self, observation: np.ndarray, previous_reward: np.ndarray, episode_start: np.ndarray | None = None
    ) -> np.ndarray:
        """The actions of the next step.

        Args:
            observation: (B, o) as the environment gives it.
            previous_reward: (B,) what the action before has earned, as the environment gives it; the last reward of an
                episode comes with the first observation of the next. Of no matter in rows that have read nothing.
            episode_start: (B,) bool, rows whose observation begins an episode; None where none does. Rows that have
                read nothing begin one in any case.

        Returns:
            (B, a) float32, within the action space.

        Raises:
            UserError: arrays of other shapes; nothing has been read then.
        """
        seen = self._read("observation", observation, self.rows, len(self.mean))
        paid = self._read("previous_reward", previous_reward, self.rows)
        start = self.fresh
        if episode_start is not None:
            start = start | self._read("episode_start", episode_start, self.rows).bool()
        self.step_in_episode = torch.where(start, 0, self.step_in_episode + 1)
        tokens = self.model.embed(
            ((seen - self.mean) / self.std)[:, None],
            self.action[:, None],
            (paid * self.reward_scale)[:, None, None],
            start[:, None],
            self.fresh[:, None],
            self.step_in_episode[:, None],
            self.group,
        )
        self.ring.advance(self.slopes)
        attends = [functools.partial(self.ring.attend, layer) for layer in range(len(self.model.blocks))]
        hidden = self.model.run(tokens, attends)
        self.action = torch.minimum(torch.maximum(self.model.heads[self.group](hidden)[:, 0], self.low), self.high)
        self.fresh = torch.zeros_like(self.fresh)
        return self.action.float().cpu().numpy().copy()  # the caller may change it; the model knows what it answered

    def _read(self, name: str, values: object, *shape: int) -> Tensor:
        tensor = self._tensor(values)
        if tensor.shape != shape:
            raise UserError(f"{name} has the shape {tuple(tensor.shape)}, not {shape}")
        return tensor

    def _tensor(self, values: object) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=self.dtype, device=self.device)
