"""The recurrence of context vectors, c_t = f(c_{t−1}, x_t): all tokens at once where it is linear, else in a loop."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from newllm.errors import UserError, nearest
from newllm.models.linear import Linear
from newllm.models.options import check_count, check_divides
from newllm.ops.scan import linear_scan

GATES = {"none": 0, "update": 1, "update_forget": 2, "input": 1}
"""Their names, and how many each number of a context has."""
SCALES: dict[str, float] = {"short": 2, "long": 512}
"""Tokens after which what a context holds has faded to 1/e: about, as long as its gates are as they began."""


class ContextCell(nn.Module):
    """K context vectors of S numbers that every token moves on: c_t = a_t c_{t−1} + b_t, c_0 = 0. By `gates`:

    - none: a = 1, b = v; with time scales a = 1 − r, b = r v, where r = σ(β)
    - update: a = 1 − z, b = z v
    - update_forget: a = 1 − f, b = z v
    - input: a = 1 − z, b = √(1 − a²) v, which keeps the variance of v (RG-LRU, arXiv 2402.19427)

    The candidate v = tanh(W_v x_t + U_v n_{t−1}), where n is the LayerNorm of all K contexts together, is one for all
    of them, and gates are σ(W x_t + U n_{t−1} + g_t + β). The learned β are K·S numbers for each gate; g_t = W_g x_t is
    one number for each gate, context and head, so that a token chooses which contexts it writes. For 'input'
    nothing depends on c_{t−1}: U = 0, and v is linear (minGRU, arXiv 2410.01201). The recurrence is then linear in
    c, and computed for all tokens at once, exactly.

    Time scales: σ(β) begins at 1/τ, where τ goes in geometric steps from short to long over the numbers of a context
    (chrono initialisation, arXiv 1804.11188), and begins at another place in every context, so that the K numbers that
    share a candidate differ. Without, σ(β) begins at 1/2 everywhere.

    Args:
        hidden_size: D of x.
        num_heads: H, parts of a context that share a number of g_t.
        context_size: S, a multiple of H.
        num_contexts: K.
        gates: see above.
        time_scales: {'short', 'long'} in tokens, see `scales_of`; or None.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        context_size: int,
        num_contexts: int,
        gates: str,
        time_scales: dict[str, float] | None,
    ) -> None:
        super().__init__()
        check_cell(num_heads, context_size, num_contexts, gates, scaled=time_scales is not None)
        self.num_heads, self.context_size, self.num_contexts = num_heads, context_size, num_contexts
        self.time_scales, self.num_gates, self.is_linear = time_scales, GATES[gates], gates == "input"
        choices = self.num_gates * num_contexts * num_heads if num_contexts > 1 else 0
        self.widths = (context_size, self.num_gates * context_size, choices)
        self.project = Linear(hidden_size, sum(self.widths))
        self.fades = self.num_gates > 0 or time_scales is not None
        self.retained = nn.Identity()  # every a goes through it, so that a forward hook sees what the gates do
        if self.fades:
            self.rates = nn.Parameter(self._first_rates())
        if not self.is_linear:
            self.norm = nn.LayerNorm(num_contexts * context_size)
            self.recur = Linear(num_contexts * context_size, sum(self.widths[:2]), bias=False)

    def _first_rates(self) -> Tensor:
        """β: a vector, as vectors have no weight decay. Of two gates, forget's come last."""
        short, long = (2.0, 2.0) if self.time_scales is None else (self.time_scales["short"], self.time_scales["long"])
        K, S = self.num_contexts, self.context_size
        scales = torch.linspace(math.log(short), math.log(long), S).exp()
        of_contexts = torch.cat([scales.roll(k * S // K) for k in range(K)])
        return -(of_contexts - 1).log().repeat(max(self.num_gates, 1))

    def reset_parameters(self) -> None:
        if self.fades:
            initialization.copy_(self.rates, self._first_rates())

    def forward(self, x: Tensor, real: Tensor | None, before: Tensor | None) -> Tensor:
        """The contexts after each token: (B, T, K, S), in float32 at least.

        Args:
            x: (B, T, D).
            real: (B, T) bool, False for padding, at which contexts stay as they are; None if all are real.
            before: (B, K, S) contexts before the first token; None for zeros.
        """
        driven = self.project(x)
        if self.is_linear:
            a, b = self._factors(driven)
            a = self.retained(a)
            if real is not None:
                a, b = a.masked_fill(~real[..., None, None], 1), b.masked_fill(~real[..., None, None], 0)
            return linear_scan(a, b, before)
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (len(x), self.num_contexts, self.context_size)
        c = torch.zeros(shape, dtype=dtype, device=x.device) if before is None else before
        contexts = []
        for t, own in enumerate(driven.unbind(1)):  # the gradient of [:, t] would be T − 1 zeros, too
            new = self._step(own, c)
            c = new if real is None else torch.where(real[:, t, None, None], new, c)
            contexts.append(c)
        return torch.stack(contexts, dim=1)

    def iterate(self, x: Tensor, lagged: Tensor) -> Tensor:
        """(B, T, K, S), the contexts after each token if before it they were lagged (B, T, K, S)."""
        return self._step(self.project(x), lagged)

    def _step(self, driven: Tensor, c: Tensor) -> Tensor:
        """Contexts (…, K, S) after a token that has given `driven` (…, W), from those before it."""
        fed_back = self.recur(self.norm(c.flatten(-2).to(driven.dtype)))
        if self.widths[2]:
            fed_back = F.pad(fed_back, (0, self.widths[2]))
        a, b = self._factors(driven + fed_back)
        return self.retained(a) * c + b

    def _factors(self, driven: Tensor) -> tuple[Tensor, Tensor]:
        """a and b (…, K, S), in float32 at least, from (…, W): candidate, gates and choices, before nonlinearities."""
        K, S, G = self.num_contexts, self.context_size, self.num_gates
        driven = driven.to(torch.promote_types(driven.dtype, torch.float32))
        v, gates, choices = driven.split(self.widths, dim=-1)
        v = (v if self.is_linear else v.tanh()).unsqueeze(-2)  # (…, 1, S)
        if not self.fades:
            return torch.ones_like(v), v
        logits = self.rates.to(driven.dtype).view(-1, K, S)
        if G:
            logits = logits + gates.unflatten(-1, (G, 1, S))  # (…, G, K, S)
        if K > 1 and G:
            of_heads = choices.unflatten(-1, (G, K, self.num_heads))
            logits = logits + of_heads.repeat_interleave(S // self.num_heads, dim=-1)
        of_gates = logits.unbind(-3)
        write, forget = of_gates[0], of_gates[-1]
        a = (-forget).sigmoid()
        if self.is_linear:
            # 1 − a² = z (2 − z); its root by the logarithm of z, whose gradient is finite where z is almost 0.
            return a, v * F.logsigmoid(write).mul(0.5).exp() * (1 + a).sqrt()
        return a, write.sigmoid() * v

    def reference(self, x: Tensor, contexts: list[Tensor]) -> list[Tensor]:
        """The naive twin: K contexts (S) after a token x (D), from those before it, formula by formula."""
        K, S, G, H = self.num_contexts, self.context_size, self.num_gates, self.num_heads
        driven = self.project.weight @ x + self.project.bias
        if not self.is_linear:
            fed_back = self.recur.weight @ self.norm(torch.cat(contexts))
            driven = torch.cat([driven[: S + G * S] + fed_back, driven[S + G * S :]])
        v = driven[:S] if self.is_linear else driven[:S].tanh()
        if not self.fades:
            return [c + v for c in contexts]
        after = []
        for k, c in enumerate(contexts):
            gates = []
            for gate, rates in enumerate(self.rates.view(-1, K, S)):
                logits = rates[k]
                if G:
                    logits = logits + driven[S + gate * S : S + gate * S + S]
                if G and K > 1:
                    choices = driven[S + G * S :].view(G, K, H)[gate, k]
                    logits = logits + torch.cat([choice.expand(S // H) for choice in choices])
                gates.append(1 / (1 + (-logits).exp()))
            write, a = gates[0], 1 - gates[-1]
            after.append(a * c + ((1 - a**2).sqrt() if self.is_linear else write) * v)
        return after


def scales_of(time_scales: dict[str, float] | None) -> dict[str, float] | None:
    """Time scales complete: what is not given of {'short', 'long'} is SCALES'. Raises UserError for what is none."""
    if time_scales is None:
        return None
    if not isinstance(time_scales, dict):
        raise UserError(f"time_scales is {time_scales!r}: it must be null or tokens, as in time_scales.long=256")
    for name in time_scales:
        if name not in SCALES:
            raise nearest(str(name), list(SCALES), "option", "of time_scales")
    complete = SCALES | time_scales
    for name, value in complete.items():
        if type(value) not in (int, float) or not 1 < value < math.inf:
            raise UserError(f"time_scales.{name} is {value!r}: it must be a number of tokens above 1")
    return complete


def check_cell(num_heads: int, context_size: int, num_contexts: int, gates: str, scaled: bool) -> None:
    """Raises UserError for options no cell can have."""
    check_count("context_size", context_size)
    check_count("num_contexts", num_contexts)
    check_divides("context_size", context_size, "num_heads", num_heads)
    if not isinstance(gates, str) or gates not in GATES:
        raise nearest(str(gates), list(GATES), "gates", "of context vectors")
    if num_contexts > 1 and not GATES[gates] and not scaled:
        raise UserError(
            f"num_contexts is {num_contexts}, but without gates and time_scales all would be the same vector: give "
            "time_scales.long=256, or gates"
        )
