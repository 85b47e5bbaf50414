"""The points of the contract that every model keeps, each a question to a live model (SYSTEMS §16)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from newllm.models.cache import bytes_of
from newllm.models.transformer import TransformerLM


@dataclass(frozen=True)
class Subject:
    """What is checked: a model in eval mode and ids (B ≥ 3, T) it reads."""

    model: TransformerLM
    ids: Tensor
    tolerance: float

    def logits(self, ids: Tensor, **inputs) -> Tensor:
        """(B, T, V) over the whole sequence at once."""
        return self.model(ids, use_cache=False, **inputs).logits

    def chunked(self, ids: Tensor, sizes: list[int], **inputs) -> Tensor:
        """(B, T, V), read chunk by chunk through the model's own cache."""
        cache = self.model.make_cache()
        return torch.cat([self.model(c, past_key_values=cache, **inputs).logits for c in ids.split(sizes, 1)], dim=1)

    def difference(self, a: Tensor, b: Tensor) -> tuple[float, int | None]:
        """Largest difference of logits relative to the largest logit, and the first token beyond tolerance."""
        gap = (a - b).abs().amax(dim=(0, 2)) / b.abs().max()  # (T,)
        worse = (~(gap <= self.tolerance)).nonzero()
        return float(gap.max()), int(worse[0]) if len(worse) else None


Check = Callable[[Subject], tuple[bool | None, str]]
"""Whether a point is kept (None: it cannot be judged), and what was found, in words."""


def _finite(s: Subject) -> tuple[bool, str]:
    for name, parameter in s.model.named_parameters():
        if not parameter.isfinite().all():
            return False, f"parameter {name} holds NaN or infinity"
    bad = (~s.logits(s.ids).isfinite().all(dim=2)).nonzero()
    if len(bad):
        return False, f"logits are not finite from token {int(bad[:, 1].min())} on"
    return True, "all parameters and logits are finite"


def _future(s: Subject) -> tuple[bool, str]:
    T = s.ids.shape[1]
    base = s.logits(s.ids)
    wanted = {1, 2, 3, T // 4, T // 3, T // 2, T // 2 + 1, 3 * T // 4, T - 2, T - 1}
    places = sorted(t for t in wanted if 0 < t < T)
    for t in places:
        changed = s.ids.clone()
        changed[:, t] = (changed[:, t] + 1) % s.model.config.vocab_size
        moved = (s.logits(changed)[:, :t] != base[:, :t]).any(dim=2).any(dim=0).nonzero()
        if len(moved):
            reach = t - int(moved[-1])
            return False, (
                f"leaks the future: changing token {t} changes the logits of token {int(moved[-1])}, "
                f"{reach} before it (first of {len(moved)} earlier tokens: {int(moved[0])})"
            )
    return True, f"changing a token (tried {len(places)} places) changes no earlier logit, bit for bit"


def _rows(s: Subject) -> tuple[bool, str]:
    base = s.logits(s.ids)
    changed = s.ids.clone()
    changed[1] = (changed[1] + 1) % s.model.config.vocab_size
    after = s.logits(changed)
    for row in (0, 2):
        moved = (after[row] != base[row]).any(dim=1).nonzero()
        if len(moved):
            return False, f"mixes rows: changing row 1 changes the logits of row {row} from token {int(moved[0])} on"
    order = torch.tensor([2, 0, 1], device=s.ids.device)
    gap, token = s.difference(s.logits(s.ids[order]), base[order])
    if token is not None:
        return False, f"mixes rows: permuting the batch changes logits from token {token} on, by {gap:.2g}"
    gap, token = s.difference(s.logits(s.ids[:1]), base[:1])
    if token is not None:
        return (
            False,
            f"mixes rows: a row alone differs from the same row in a batch from token {token} on, by {gap:.2g}",
        )
    return True, "changing, permuting and adding rows changes no other row"


def _padding(s: Subject) -> tuple[bool, str]:
    B, T = s.ids.shape
    pads = torch.arange(B, device=s.ids.device) * 2 + 1  # every row padded differently
    width = T + int(pads.max())
    ids = torch.zeros(B, width, dtype=torch.long, device=s.ids.device)
    mask = torch.zeros_like(ids)
    for row, pad in enumerate(pads.tolist()):
        start = width - T if row == 0 else width - T - pad + 1  # left padding, and for some rows also right
        ids[row, start : start + T], mask[row, start : start + T] = s.ids[row], 1
    base = s.logits(s.ids)
    padded = s.logits(ids, attention_mask=mask)
    for row in range(B):
        gap, token = s.difference(padded[row : row + 1, mask[row].bool()], base[row : row + 1])
        if token is not None:
            return (
                False,
                f"padding is read as text: with padding, row {row} differs from token {token} on, by {gap:.2g}",
            )
    return True, "padding changes nothing for the real tokens"


def _rounding(s: Subject, gap: float) -> str:
    """A hint for the commonest small mistake."""
    small = s.model.dtype == torch.float64 and gap < 1e-5
    return (
        " (the size of float32 rounding: does the layer compute something in another dtype than x.dtype?)"
        if small
        else ""
    )


def _chunks(s: Subject) -> tuple[bool, str]:
    T = s.ids.shape[1]
    full = s.logits(s.ids)
    worst = 0.0
    splits = {
        "token by token": [1] * T,
        f"in two chunks of {T // 2} and {T - T // 2} tokens": [T // 2, T - T // 2],
        f"in chunks of 1, 7, 1 and {T - 9} tokens": [1, 7, 1, T - 9],
        f"in chunks of {T - 1} and 1 tokens": [T - 1, 1],
    }
    for words, sizes in splits.items():
        gap, token = s.difference(s.chunked(s.ids, sizes), full)
        if token is not None:
            return False, (
                f"cache and forward disagree: read {words}, the logits differ from reading all at once "
                f"from token {token} on, by {gap:.2g} of the largest{_rounding(s, gap)}"
            )
        worst = max(worst, gap)
    return True, f"token by token and in chunks = all at once (largest relative difference {worst:.1g})"


def _after_padding(s: Subject) -> tuple[bool, str]:
    B, T = s.ids.shape
    half, starts = T // 2, [3, 1] + [0] * (B - 2)  # of each row's text among its padding, of which there are 3
    ids = torch.zeros(B, half + 3, dtype=torch.long, device=s.ids.device)
    mask = torch.zeros_like(ids)
    for row, start in enumerate(starts):
        ids[row, start : start + half], mask[row, start : start + half] = s.ids[row, :half], 1
    mask = torch.cat([mask, mask.new_ones(B, T - half)], dim=1)
    cache, stop, logits = s.model.make_cache(), 0, []
    for chunk in torch.cat([ids, s.ids[:, half:]], dim=1).split([half + 3, 1, T - half - 1], dim=1):
        stop += chunk.shape[1]
        logits.append(s.model(chunk, attention_mask=mask[:, :stop], past_key_values=cache).logits)
    base = s.logits(s.ids)[:, half:]
    for row, start in enumerate(starts):
        gap, token = s.difference(torch.cat(logits[1:], dim=1)[row : row + 1], base[row : row + 1])
        if token is not None:
            return False, (
                f"padding moves the state: with {start} padded tokens left and {3 - start} right of the first {half} "
                f"tokens, the logits of row {row} differ from token {half + token} on, by {gap:.2g}"
            )
    return True, "padding, also right of what the cache has read, changes nothing for what follows it"


def _reorder(s: Subject) -> tuple[bool, str]:
    half = s.ids.shape[1] // 2
    first, second = s.ids[:, :half], s.ids[:, half:]
    order = torch.tensor([2, 2, 0], device=s.ids.device)
    cache = s.model.make_cache()
    s.model(first, past_key_values=cache)
    cache.reorder_cache(order)  # type: ignore[arg-type]
    after = s.model(second[order], past_key_values=cache).logits
    gap, token = s.difference(after, s.logits(s.ids)[order, half:])
    if token is not None:
        return False, f"state does not follow its rows: after reordering (beam search), logits differ by {gap:.2g}"
    cache = s.model.make_cache()
    s.model(first, past_key_values=cache)
    cache.reset_rows(torch.tensor([False, True, False], device=s.ids.device))
    positions = torch.arange(half, s.ids.shape[1], device=s.ids.device).repeat(3, 1)
    positions[1] -= half
    after = s.model(second, past_key_values=cache, position_ids=positions).logits
    gap, token = s.difference(after[1:2], s.logits(second[1:2]))
    if token is not None:
        return False, f"a reset row still remembers: its logits differ from a fresh start by {gap:.2g}"
    gap, token = s.difference(after[:1], s.logits(s.ids)[:1, half:])
    if token is not None:
        return False, f"resetting one row changes another: its logits differ by {gap:.2g}"
    return True, "state can be reordered and reset row by row"


def _generate(s: Subject) -> tuple[bool, str]:
    prompt = s.ids[:2, : s.ids.shape[1] // 2]
    model: Any = s.model  # transformers types generate() by a protocol that mypy does not accept
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    start, eos = prompt.shape[1], model.generation_config.eos_token_id
    ends = torch.tensor([] if eos is None else eos, dtype=torch.long, device=made.device).view(-1)
    logits = s.logits(made)
    going = torch.ones(len(made), dtype=torch.bool, device=made.device)  # rows whose text has not ended
    for t in range(start, made.shape[1]):
        best = logits[:, t - 1].max(dim=1).values
        chosen = logits[:, t - 1].gather(1, made[:, t : t + 1]).squeeze(1)
        # Two words may tie to rounding; the chosen one must be as good as the best.
        if (going & (best - chosen > s.tolerance * best.abs().max())).any():
            return False, f"generate() and teacher forcing disagree at new token {t - start}"
        going &= ~torch.isin(made[:, t], ends)  # what follows in such a row is padding
    return True, "generate() picks the words that teacher forcing scores highest"


def _saved(s: Subject) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        s.model.save_pretrained(folder)
        loaded = type(s.model).from_pretrained(folder, dtype=s.model.dtype, device_map=s.model.device).eval()
    if not torch.equal(replace(s, model=loaded).logits(s.ids), s.logits(s.ids)):
        return False, "a saved and loaded model gives other logits: a parameter or buffer is not saved or not restored"
    return True, "saved and loaded, it gives the same logits, bit for bit"


def _bytes(s: Subject) -> tuple[bool | None, str]:
    precision = s.model.config.cache_precision
    for tokens in (1, 5, s.ids.shape[1]):
        plain, cache = s.model.make_cache("model"), s.model.make_cache()
        for empty in (plain, cache):
            s.model(s.ids[:1, :tokens], past_key_values=empty)
        try:
            closed_forms = s.model.state_bytes(tokens, s.model.dtype.itemsize)
        except NotImplementedError:
            return None, "not judged: a layer gives no closed form (state_bytes)"
        for n, (closed_form, *states) in enumerate(zip(closed_forms, plain.layers, cache.layers, strict=True)):
            for state, expected in zip(states, (closed_form, states[0].bytes_at(precision)), strict=True):
                measured = bytes_of(state.tensors().values())
                if measured != expected:
                    return (
                        False,
                        f"state {n} holds {measured:,} bytes at precision {state.precision} after {tokens} tokens, its "
                        f"closed form says {expected:,}",
                    )
    return True, f"measured state bytes = closed form at 1, 5 and {s.ids.shape[1]} tokens"


def _twin(s: Subject) -> tuple[bool | None, str]:
    T = min(s.ids.shape[1], 12)
    # Of the layers' own width, which need not be the embedding's.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, T, s.model.config.hidden_size, generator=generator).to(s.ids.device, s.model.dtype)
    positions = torch.arange(T, device=s.ids.device).expand(2, T)
    for n, layer in enumerate(s.model.layers):
        fast = layer(x, positions=positions, mask=None, state=None)
        try:
            slow = layer.reference(x, positions=positions, mask=None)  # type: ignore[operator]
        except NotImplementedError:
            return None, f"not judged: {type(layer).__name__} has no naive twin (reference)"
        gap = float((fast - slow).abs().max() / slow.abs().max())
        if not gap <= s.tolerance:
            return False, f"layer {n} differs from its naive twin by {gap:.2g} of the largest output"
        x = fast
    return True, "each layer = its naive twin"


# Name → (check, the checks whose failure makes it meaningless).
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "finite": (_finite, ()),
    "future": (_future, ("finite",)),
    "rows": (_rows, ("finite",)),
    "padding": (_padding, ("finite", "future", "rows")),
    "chunks": (_chunks, ("finite", "future")),
    "after padding": (_after_padding, ("finite", "future", "rows", "padding", "chunks")),
    "reorder": (_reorder, ("finite", "future", "rows", "chunks")),
    "generate": (_generate, ("finite", "future", "rows", "chunks")),
    "saved": (_saved, ("finite",)),
    "bytes": (_bytes, ("finite",)),
    "twin": (_twin, ("finite",)),
}
