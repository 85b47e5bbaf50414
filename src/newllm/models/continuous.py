"""ContinuousLM: a language model that can be fed its own hidden state in place of, or beside, the token. SYSTEMS §8.

A language model turns the hidden state after token t − 1 into a word, and reads the word at t. Is information lost on
the way? Here the state itself, projected, is what token t is read as (`input: replace`), or is added to the token
(`input: fuse`). The layers are any; every token attends to all earlier ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache

from newllm.errors import UserError
from newllm.models.config import LMConfig
from newllm.models.linear import Linear
from newllm.models.options import check_choice, check_count, check_switch
from newllm.models.passes import ManyPassesLM, Projection, normalised
from newllm.models.recurrent import RecurrentLM, lag
from newllm.models.transformer import register_architecture
from newllm.ops.loss import IGNORED

MODES = ("discrete", "continuous")
INPUTS = ("replace", "fuse")
FEEDBACKS = ("state", "distribution", "word")


class ContinuousConfig(LMConfig):
    """Configuration of `ContinuousLM`: LMConfig's, and

    Args:
        mode: 'discrete' is an ordinary language model; 'continuous' feeds its hidden state back.
        input: with mode 'continuous', 'replace' reads the fed-back state in place of the token; 'fuse' adds it to the
            token's embedding through a gate.
        feedback: 'state' feeds the state as it is; 'distribution' what is left of it as probabilities of the next
            word, the mean of all embeddings weighed by them; 'word' the embedding of the most likely one.
        extra_passes: further passes through the same layers, from h₁ to what the head reads.
        use_h1: the head reads a learned combination of first and last pass.
        pass_residual: a further pass reads h₁ + W₂ h̄₁ in place of W₂ h̄₁.
        gate_bias: where the gate of 'fuse' begins, b_g: it lets σ(b_g) of the projected state through, half for 0.

    Raises:
        UserError: for a value that means nothing.
    """

    model_type = "newllm-continuous"

    mode: str = "continuous"
    input: str = "replace"
    feedback: str = "state"
    extra_passes: int = 0
    use_h1: bool = False
    pass_residual: bool = False
    gate_bias: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("input", self.input, INPUTS)
        check_choice("feedback", self.feedback, FEEDBACKS)
        check_count("extra_passes", self.extra_passes, least=0)
        check_switch("use_h1", self.use_h1)
        check_switch("pass_residual", self.pass_residual)
        if self.use_h1 and not self.extra_passes:
            raise UserError("use_h1 combines two passes: set extra_passes to at least 1")
        if self.pass_residual and not self.extra_passes:
            raise UserError("pass_residual leads from one pass to the next: set extra_passes to at least 1")
        super().__post_init__(**kwargs)
        if not math.isfinite(self.gate_bias):
            raise UserError(f"gate_bias is {self.gate_bias}: it must be a finite number")
        if self.feedback != "state" and self.mode != "continuous":
            raise UserError("feedback says what mode=continuous feeds back, and this model feeds nothing: leave it out")
        if self.input != "replace" and self.mode != "continuous":
            raise UserError("input says how mode=continuous reads a state, and this model is fed none: leave it out")
        if self.gate_bias and (self.mode, self.input) != ("continuous", "fuse"):
            raise UserError("gate_bias is that of the gate of input=fuse, which this model has not: leave it out")


@register_architecture("continuous")
class ContinuousLM(ManyPassesLM, RecurrentLM):
    """What token t is read as, with the token's embedding e_t and the state h_{t−1} that goes into the final LayerNorm:

        discrete   x_t = e_t
        replace    x_t = W h̄_{t−1}                                             h̄ = LayerNorm(h), without parameters
        fuse       x_t = e_t + g_t ⊙ W h̄_{t−1},  g_t = σ(W_g [ē_t; h̄_{t−1}] + b_g)

    By `feedback`, s_{t−1} stands in place of h_{t−1}: with p = softmax of the logits after token t − 1, the control
    'distribution' has s = Σ_w p_w e_w and 'word' s = e_w of the w with the largest p.

    Where nothing is fed back (h_{t−1} = 0, as at the first token) all three read e_t: the model of a discrete pass is
    an ordinary language model. The gate is a function of both its inputs, for each number: a gate that is a learned
    vector would be the length of W's rows by another name.

    A continuous model has the projections of all modes, so that `compute_loss` can ask one model in each of them.
    """

    config_class = ContinuousConfig

    def __init__(self, config: ContinuousConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        D, fed_back = self.config.hidden_size, self.config.mode == "continuous"
        if fed_back:
            self.proj = Projection(D)
        if fed_back and self.config.input == "fuse":
            self.gate = Linear(2 * D, D)
        if fed_back or self.config.extra_passes:
            self.extra_proj = Projection(D)
        if fed_back or self.config.use_h1:
            self.combine = Linear(2 * D, D, bias=False)
        self.post_init()  # initialises what has come since TransformerLM did

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "gate", None):
            initialization.constant_(module.bias, self.config.gate_bias)  # type: ignore[arg-type]

    @property
    def state_size(self) -> int:
        return self.config.hidden_size if self.config.mode == "continuous" else 0

    @property
    def num_passes(self) -> int:
        return 1 + self.config.extra_passes

    def read_again(self, h: Tensor) -> Tensor:
        again = super().read_again(h)
        return h + again if self.config.pass_residual else again

    def iterate(
        self,
        input_ids: Tensor,
        lagged: Tensor,
        *,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = self._read(input_ids, lagged) if self.state_size else self.embed(input_ids)
        h = self._think(x, self.num_passes, self.config.use_h1, positions=positions, mask=mask, cache=cache)
        return self.norm(h), h[..., : self.state_size]

    def _read(self, input_ids: Tensor, lagged: Tensor) -> Tensor:
        """x (B, T, D) of tokens (B, T) and the states before them (B, T, D)."""
        e = self.embed(input_ids)
        lagged = self._said(lagged.to(e.dtype))
        back = self.proj(lagged)
        if self.config.input == "replace":
            return torch.where(lagged.any(dim=-1, keepdim=True), back, e)
        gate = torch.sigmoid(self.gate(torch.cat([normalised(e), normalised(lagged)], dim=-1)))
        return e + gate * back

    def _said(self, states: Tensor) -> Tensor:
        """What `feedback` leaves of states (B, T, D) on the way to a word; zeros, which are no state, stay zeros."""
        if self.config.feedback == "state":
            return states
        logits = self.head(self.norm(states))
        if self.config.feedback == "word":
            said = self.embed(logits.argmax(dim=-1))
        else:
            said = (logits.softmax(dim=-1) @ self.embed.weight).to(states.dtype)
        return torch.where(states.any(dim=-1, keepdim=True), said, 0)

    def _think(
        self,
        x: Tensor,
        count: int,
        use_h1: bool,
        *,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """h (B, T, D) before the final LayerNorm: of the last of `count` passes, or combined with the first."""
        states = None if cache is None else cache.layers
        first, *further = self.run_passes(x, count, positions=positions, mask=mask, states=states)
        if not use_h1:
            return further[-1] if further else first
        return self.combine(torch.cat([first, further[-1]], dim=-1)).to(first.dtype)

    def compute_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        mode: str | None = None,
        extra_pass: bool | None = None,
        use_h1: bool | None = None,
        states: Tensor | None = None,
        passes: int = 1,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The training loss in any mode, in parallel over the tokens, without a trainer.

        In mode 'continuous' this is one step of Lagged Cache Training: from `states`, or else from a discrete pass
        without gradient, `passes` iterations, the last of which carries gradient. It is not true recurrence, which
        `forward` computes.

        Args:
            input_ids: (B, T), without padding.
            labels: (B, T), not shifted; −100 is ignored.
            mode: 'discrete' or 'continuous'; default: the model's own.
            extra_pass: with as many further passes as the configuration names, at least one; or without.
            use_h1: combine the first and the last pass.
            states: (B, T, D) of an earlier iteration over the same tokens, as stats["states"] gives them.
            passes: iterations of mode 'continuous', at least 1.

        Returns:
            loss in nats per token; and stats: loss, ppl, tokens, passes, residual ‖h^k − h^{k−1}‖ / ‖h^k‖ (0 where
            nothing is fed back), states (B, T, D) after each token, detached.

        Raises:
            UserError: for a mode that the model has no weights for, or less than one pass.
        """
        if passes < 1:
            raise UserError(f"passes is {passes}: it must be at least 1")
        mode, count, use_h1 = self._route(mode, extra_pass, use_h1)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)

        def iteration(before: Tensor | None) -> Tensor:
            x = self.embed(input_ids) if before is None else self._read(input_ids, lag(before))
            return self._think(x, count, use_h1, positions=positions)

        if mode == "discrete":
            h, passes, residual = iteration(None), 1, 0.0
        else:
            with torch.no_grad():
                before = iteration(None) if states is None else states
                for _ in range(passes - 1):
                    before = iteration(before)
            h = iteration(before)
            residual = float((h.detach() - before).norm() / h.detach().norm())
        loss = self.loss_of(self.norm(h), labels)
        nats = loss.detach().double()  # whose exponential is infinite where it leaves float64, and no error
        stats = {"loss": float(nats), "ppl": float(nats.exp()), "tokens": int((labels[:, 1:] != IGNORED).sum())}
        return loss, stats | {"passes": passes, "residual": residual, "states": h.detach()}

    def _route(self, mode: str | None, extra_pass: bool | None, use_h1: bool | None) -> tuple[str, int, bool]:
        """Mode, passes through the layers, and whether the first is used again, as `compute_loss` is asked for them."""
        config = self.config
        mode = config.mode if mode is None else mode
        check_choice("mode", mode, MODES)
        extra_pass = config.extra_passes > 0 if extra_pass is None else extra_pass
        use_h1 = config.use_h1 and extra_pass if use_h1 is None else use_h1
        if use_h1 and not extra_pass:
            raise UserError("use_h1 combines two passes: ask for extra_pass=True too")
        wanted = {"proj": mode == "continuous", "extra_proj": extra_pass, "combine": use_h1}
        for name, used in wanted.items():
            if used and not hasattr(self, name):
                raise UserError(
                    f"this model has no weights '{name}'; create_model('continuous') has those of every mode"
                )
        return mode, 1 + max(1, config.extra_passes) if extra_pass else 1, use_h1
