"""Vintix (arXiv 2501.19400): a causal transformer that reads steps of reinforcement learning and writes actions.

One token for each step: encodings of observation_t, action_{t−1} and reward_{t−1} side by side. The output of the trunk
at step t is turned into action_t. The weights never change while it acts: what it learns of a task is in its context.

Tasks whose spaces are the same form a group, with encoders and a head of its own; trunk and pads are shared.

Parameters, for width D, w = D/2 − 1, L layers of H heads and width F of the MLP:

    trunk             L·(4D² + 2DF + 9D + F + 4·D/H) + 2D
    pads              w + 2
    group (o, a)      (w² + (o + 6)w) + (w² + (a + 6)w) + 4 + 3·(D² + D) + (D + 1)a

`small` (D 256, L 3, H 4, F 128) with one group of o = 4 and a = 2: 991,616 + 129 + 232,438 = 1,224,183.

The paper's (D 1024, L 20, H 16, F 4096): trunk 251,931,648 and pads 513, and its 21 groups, whose observations have
Σo = 4,323 and whose actions Σa = 481 numbers in all: 332,100,768. (Of the three pairs of sums that give this number,
this is the one that its action spaces have: MuJoCo 70, Meta-World 4, Industrial Benchmark 3, Bi-DexHands 40 + 7·52.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from newllm.errors import UserError, nearest
from newllm.models.config import BOOKKEEPING
from newllm.models.linear import Linear
from newllm.models.positions import AlibiPosition
from newllm.ops.attention import causal_attention

REWARD_WIDTH = 2  # features of a reward; observation and action share the rest of the width
WRITTEN_BY_THE_TRAINER = "use_cache"
GROUP_KEYS = ("name", "observation_mean", "observation_std", "action_low", "action_high", "reward_scale")

# Queries, keys and values (B, H, T, d) of one layer to mixed values (B, H, T, d).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_spec(
    name: str,
    observation_mean: list[float],
    observation_std: list[float],
    action_low: list[float],
    action_high: list[float],
    reward_scale: float = 1.0,
) -> dict[str, Any]:
    """A group as it stands in the configuration: the sizes of its spaces, and what turns raw numbers into the model's.

    The model reads (observation − mean) / std and reward · reward_scale; it writes actions in their own units, which
    are clipped to [action_low, action_high] where they are used.
    """
    values = (name, observation_mean, observation_std, action_low, action_high, reward_scale)
    return dict(zip(GROUP_KEYS, values, strict=True))


class VintixConfig(PreTrainedConfig):
    """Configuration of `VintixModel`.

    Args:
        groups: one `group_spec` for each kind of spaces.
        hidden_size: width D.
        num_layers, num_heads, intermediate_size: of the trunk.
        context: steps a step sees, itself included: the length of the training sequences.
        carry_reward: the first step of an episode sees the last reward of the episode before. Without it that reward
            is a learned pad, and the reward of a last step is never seen.
        inner_ep_pos_enc: add an embedding of the step within its episode.
        max_episode_steps: size of that table; later steps take its last entry.
        dropout: of attention weights and of what is added to the residual stream.

    Raises:
        UserError: for an unknown option, or sizes that do not fit together.
    """

    model_type = "newllm-vintix"

    groups: list[dict[str, Any]] = field(default_factory=list)
    hidden_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    intermediate_size: int = 128
    context: int = 2048
    carry_reward: bool = True
    inner_ep_pos_enc: bool = False
    max_episode_steps: int = 1000
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in (*BOOKKEEPING, WRITTEN_BY_THE_TRAINER) and not name.startswith("_"):
                raise nearest(name, list(VintixConfig.__annotations__), "option", "of VintixConfig")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} does not divide into num_heads {self.num_heads}")
        if self.hidden_size % 2 or self.hidden_size < 2 * REWARD_WIDTH:
            raise UserError(f"hidden_size is {self.hidden_size}: it must be an even number of at least 4")
        super().__post_init__(**kwargs)


class GroupEncoder(nn.Module):
    """Observation, action and reward of one group to w, w and 2 features, with w = D/2 − 1."""

    def __init__(self, observation_size: int, action_size: int, hidden_size: int) -> None:
        super().__init__()
        width = (hidden_size - REWARD_WIDTH) // 2
        self.observation, self.action = _vector_encoder(observation_size, width), _vector_encoder(action_size, width)
        self.reward = nn.Sequential(Linear(1, REWARD_WIDTH), nn.LeakyReLU())


def _vector_encoder(size: int, width: int) -> nn.Sequential:
    first = (Linear(size, width), nn.LeakyReLU(), nn.LayerNorm(width))
    return nn.Sequential(*first, Linear(width, width), nn.LeakyReLU(), nn.LayerNorm(width))


def _head(hidden_size: int, action_size: int) -> nn.Sequential:
    hidden = [part for _ in range(3) for part in (Linear(hidden_size, hidden_size), nn.LeakyReLU())]
    return nn.Sequential(*hidden, Linear(hidden_size, action_size))


class Block(nn.Module):
    """x + attention(ln x), then x + mlp(ln x): GPT-NeoX's block, residuals in sequence, queries and keys normalised."""

    def __init__(self, config: VintixConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.head_size = D // config.num_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(D, eps), nn.LayerNorm(D, eps)
        self.qkv, self.out = Linear(D, 3 * D), Linear(D, D)
        self.norm_q, self.norm_k = nn.LayerNorm(self.head_size, eps), nn.LayerNorm(self.head_size, eps)
        self.up, self.down = Linear(D, config.intermediate_size), Linear(config.intermediate_size, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = attend(self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype), v)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_mlp(x)))))


@dataclass
class VintixOutput(ModelOutput):
    """What a call returns."""

    loss: Tensor | None = None
    """Mean squared error of all steps and numbers of an action, in the action's units squared."""
    actions: Tensor | None = None
    """(B, T, a), not clipped."""


class VintixModel(PreTrainedModel):
    """Encoders of each group, pads, trunk, heads of each group."""

    config_class = VintixConfig
    config: VintixConfig
    base_model_prefix = ""
    accepts_loss_kwargs = False

    def __init__(self, config: VintixConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        sizes = [(len(group["observation_mean"]), len(group["action_low"])) for group in config.groups]
        self.encoders = nn.ModuleList(GroupEncoder(*size, D) for size in sizes)
        self.action_pad = nn.Parameter(torch.empty((D - REWARD_WIDTH) // 2))
        self.reward_pad = nn.Parameter(torch.empty(REWARD_WIDTH))
        self.episode_steps = nn.Embedding(config.max_episode_steps, D) if config.inner_ep_pos_enc else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(D, config.layer_norm_eps)
        self.heads = nn.ModuleList(_head(D, action_size) for _, action_size in sizes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initial values; through torch.nn.init, which transformers makes spare what was loaded."""
        if module is self:
            nn.init.normal_(self.action_pad)
            nn.init.normal_(self.reward_pad)
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def slopes(self, device: torch.device) -> Tensor:
        """(H,) ALiBi slopes, geometric; in nats per step."""
        return AlibiPosition(slopes="geometric").head_slopes(self.config.num_heads, device)

    def embed(
        self,
        observation: Tensor,
        previous_action: Tensor,
        previous_reward: Tensor,
        episode_start: Tensor,
        history_start: Tensor,
        step_in_episode: Tensor,
        group: int = 0,
    ) -> Tensor:
        """Tokens (B, T, D); arguments as in `forward`.

        Never in bf16: what is observed and paid would be known to three digits in training, and better in play.
        """
        encoder: GroupEncoder = self.encoders[group]  # type: ignore[assignment]
        no_reward = history_start if self.config.carry_reward else episode_start
        with torch.autocast(observation.device.type, enabled=False):
            action = torch.where(episode_start[..., None], self.action_pad, encoder.action(previous_action))
            reward = torch.where(no_reward[..., None], self.reward_pad, encoder.reward(previous_reward))
            tokens = torch.cat([encoder.observation(observation), action, reward], dim=-1)
        if self.episode_steps is not None:
            tokens = tokens + self.episode_steps(step_in_episode.clamp(max=self.config.max_episode_steps - 1))
        return tokens

    def run(self, tokens: Tensor, attends: list[Attend]) -> Tensor:
        """The trunk: tokens (B, T, D) to (B, T, D), with the attention of each layer."""
        x = tokens
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, attend)
        return self.norm(x)

    def forward(
        self,
        observation: Tensor,
        previous_action: Tensor,
        previous_reward: Tensor,
        episode_start: Tensor,
        history_start: Tensor,
        step_in_episode: Tensor,
        action: Tensor | None = None,
        group: int = 0,
        last_only: bool = False,
    ) -> VintixOutput:
        """Reads T steps at once, each of which sees the last `config.context` steps.

        Args:
            observation: (B, T, o), normalised.
            previous_action: (B, T, a), in the action's units; ignored where an episode starts.
            previous_reward: (B, T, 1), scaled; ignored where there is none to see.
            episode_start, history_start: (B, T) bool, the first steps of episodes, and those before which there was
                nothing.
            step_in_episode: (B, T) counts from 0.
            action: (B, T, a) what it should say, for the loss.
            group: index of the group in the configuration.
            last_only: actions of the last step alone.
        """
        tokens = self.embed(
            observation, previous_action, previous_reward, episode_start, history_start, step_in_episode, group
        )
        hidden = self.run(tokens, [self._attend] * len(self.blocks))
        actions = self.heads[group](hidden[:, -1:] if last_only else hidden)
        loss = None if action is None else F.mse_loss(actions.to(action.dtype), action)
        return VintixOutput(loss=loss, actions=actions)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over the last `context` steps."""
        dropout = self.config.dropout if self.training else 0.0
        return causal_attention(q, k, v, slopes=self.slopes(q.device), window=self.config.context, dropout=dropout)
