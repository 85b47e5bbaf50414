"""SelectiveLM: after each pass through the layers a learned gate says whether to speak or to think once more.

SYSTEMS §11. The project's own idea, built because it fails, and to show why: what a gate may leave out of the loss, it
does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from newllm.errors import UserError
from newllm.models.config import LMConfig
from newllm.models.linear import Linear
from newllm.models.options import check_count, check_switch
from newllm.models.passes import ManyPassesLM, Projection
from newllm.models.transformer import TransformerLM, register_architecture
from newllm.ops.loss import IGNORED, linear_cross_entropy

FORWARD = inspect.signature(TransformerLM.forward)
READ = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


class SelectiveConfig(LMConfig):
    """Configuration of `SelectiveLM`: LMConfig's, and

    Args:
        max_skip: how often a token may be thought about once more, S: there are S + 1 passes.
        threshold: outside training, a token is emitted from the first pass whose gate reaches it, else from the last.
        must_emit: what no gate has emitted counts as emitted from the last pass, so that the loss leaves nothing out.

    Raises:
        UserError: for a value that means nothing.
    """

    model_type = "newllm-selective"

    max_skip: int = 1
    threshold: float = 0.5
    must_emit: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_count("max_skip", self.max_skip, least=0)
        check_switch("must_emit", self.must_emit)
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold!r}: it must lie in [0, 1]")
        super().__post_init__(**kwargs)


@register_architecture("selective")
class SelectiveLM(ManyPassesLM):
    """S + 1 passes through the same layers, p = 0 … S, and one gate g_p,t = σ(w · norm(h_p,t) + b) for all of them.

        h_0 = layers(e),  h_p = layers(extra_proj(h_{p−1}))
        a_p,t = g_p,t · Π_{q<p} (1 − g_q,t)         the share of token t that is emitted from pass p
        training loss = Σ_t,p a_p,t · ℓ_p,t / Σ_t,p a_p,t       ℓ_p,t = −log p(token t + 1 | pass p of tokens ≤ t)

    With S = 0 that is Σ g·ℓ / Σ g. Outside training one pass speaks, chosen by the threshold, and every token counts
    once: `forward`, `generate` and `token_losses` are unweighted.

    Every token goes through all passes, whether or not it has been emitted: pass p attends over pass p of the earlier
    tokens, which for none of them may be missing. So a pass is causal, cache and forward agree, and nothing is saved.
    """

    config_class = SelectiveConfig

    def __init__(self, config: SelectiveConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        D = self.config.hidden_size
        if self.num_passes > 1:
            self.extra_proj = Projection(D)
        self.gate = Linear(D, 1)
        self.post_init()  # initialises what has come since TransformerLM did

    @property
    def num_passes(self) -> int:
        return 1 + self.config.max_skip

    def run_layers(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, states: Sequence[Any] | None) -> Tensor:
        """All passes: (B, T, D) to h (S + 1, B, T, D)."""
        return torch.stack(self.run_passes(x, self.num_passes, positions=positions, mask=mask, states=states))

    def all_hidden_states(self, *args: Any, **kwargs: Any) -> Tensor:
        """(S + 1, B, T, D), after the final LayerNorm; arguments as of `hidden_states`."""
        return super().hidden_states(*args, **kwargs)

    def hidden_states(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `TransformerLM.hidden_states`, (B, T, D): of the pass from which each token is emitted."""
        hidden = self.all_hidden_states(*args, **kwargs)
        chosen = self.chosen_pass(self.gates(hidden))
        return hidden.gather(0, chosen[None, ..., None].expand(1, *hidden.shape[1:])).squeeze(0)

    def gates(self, hidden: Tensor) -> Tensor:
        """g (S + 1, B, T), in float32 at least, from hidden states (S + 1, B, T, D)."""
        scores = self.gate(hidden).squeeze(-1)
        return torch.sigmoid(scores.to(torch.promote_types(scores.dtype, torch.float32)))

    def chosen_pass(self, gates: Tensor) -> Tensor:
        """(B, T): the first pass whose gate reaches the threshold, else the last. gates: (S + 1, B, T)."""
        reached = gates >= self.config.threshold
        reached[-1] = True
        return reached.int().argmax(dim=0)

    def shares(self, gates: Tensor) -> Tensor:
        """a (S + 1, B, T): how much of each token is emitted from each pass. gates: (S + 1, B, T)."""
        kept = torch.cat([torch.ones_like(gates[:1]), (1 - gates[:-1]).cumprod(dim=0)])  # Π_{q<p} (1 − g_q)
        shares = gates * kept
        return torch.cat([shares[:-1], kept[-1:]]) if self.config.must_emit else shares

    @functools.wraps(TransformerLM.forward, assigned=())  # its arguments, and a docstring of our own
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `TransformerLM.forward`; in training with labels the loss is the weighted one, over the passes.

        Accumulated over micro-batches, it is the mean of their weighted losses, each by its number of targets.
        """
        given = FORWARD.bind(self, *args, **kwargs).arguments
        if not self.training or given.get("labels") is None:
            return super().forward(*args, **kwargs)
        if given.get("update_memory"):
            self._check_can_update(cached=given.get("past_key_values") is not None)
        inputs = {name: given[name] for name in READ if name in given}
        loss = self.weighted_loss(self.all_hidden_states(**inputs), given["labels"], given.get("num_items_in_batch"))
        output = CausalLMOutputWithPast(loss=loss, past_key_values=given.get("past_key_values"))
        return output.to_tuple() if given.get("return_dict") is False else output

    def weighted_loss(self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Σ a·ℓ / Σ a over targets and passes; hidden (S + 1, B, T, D), the others as of `forward`."""
        targets = labels[:, 1:].expand(self.num_passes, -1, -1)
        shares = self.shares(self.gates(hidden))[..., :-1] * (targets != IGNORED)
        nats = linear_cross_entropy(
            hidden[:, :, :-1].flatten(0, 2), self.head.weight, targets.flatten(), shares=shares.flatten()
        )
        weight = shares.sum()
        loss = nats / torch.where(weight > 0, weight, 1)  # without a target 0, and so is every gradient
        return loss if num_items_in_batch is None else loss * (labels[:, 1:] != IGNORED).sum() / num_items_in_batch

    def pass_losses(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ (S + 1, B, T − 1) in nats, without gradient, and the gates (S + 1, B, T − 1) at the same places."""
        hidden = self.all_hidden_states(input_ids)[:, :, :-1]
        targets = input_ids[:, 1:].expand(self.num_passes, -1, -1)
        nats = linear_cross_entropy(hidden.flatten(0, 2), self.head.weight, targets.flatten(), "none")
        return nats.view(targets.shape), self.gates(hidden)
