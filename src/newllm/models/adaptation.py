"""A trained model's weights put into a model of other layers (SYSTEMS §12): a start from which training recovers.

What has the same name and shape is copied. Where attention keeps less than the trained one did, its projections are
made from the trained ones and from what those give on a text:

- latents (MLA): y = [k; v] of a token is projected onto the r directions along which it varies most,
  y ≈ μ + U Uᵀ (y − μ), which is the best of rank r in mean square: c = Uᵀ (W_KV x + b − μ), [W_UK; W_UV] = U. (An SVD
  of [W_K; W_V] weighted by the covariance of x is the same thing.) The mean of the keys adds as much to every score of
  a query and is dropped; that of the values passes through attention unchanged, and goes into the output's bias.
- narrow values (V-DProj): the same, head by head, for v alone; the output projection takes U.
- fewer key and value heads (GQA, MQA): the mean of those they stand for (Ainslie et al., 2023, arXiv 2305.13245).

Positions are not adapted: what a model knew by rotating keys, one without rotation has to learn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from newllm.errors import UserError
from newllm.models.layers.mla import MLALayer
from newllm.models.layers.pythia import PythiaLayer
from newllm.models.layers.v_dproj import VDProjLayer
from newllm.models.transformer import TransformerLM

VOCABULARY = ("embed.weight", "head.weight")
"""What has a row for each word, of which a checkpoint may hold more than its tokenizer knows."""


@torch.no_grad()
def adapt(source: TransformerLM, target: TransformerLM, batches: Iterable[Tensor]) -> list[str]:
    """Puts the weights of source into target; batches: ids (B, T) of ordinary text, read by source.

    Returns:
        names of the parameters that found nothing in source, and keep the values they had.

    Raises:
        UserError: another number of layers, another width, fewer words, MLPs that read something else, or no place for
            the head.
    """
    if len(source.layers) != len(target.layers):
        raise UserError(f"the trained model has {len(source.layers)} layers, the one to adapt {len(target.layers)}")
    check_residuals([getattr(layer, "parallel_residual", True) for layer in source.layers], target)
    if target.config.tie_word_embeddings and not source.config.tie_word_embeddings:
        raise UserError(
            "the trained model has a head of its own, and the one to adapt, with tie_word_embeddings=true, no place "
            "for it: leave that out"
        )
    theirs, own = dict(source.named_parameters(remove_duplicate=False)), []  # a tied head by its own name too
    for name, parameter in target.named_parameters():
        trained: Tensor | None = theirs.get(name)
        if trained is not None and name in VOCABULARY:
            if trained.shape[1] != parameter.shape[1] or len(trained) < len(parameter):
                raise UserError(
                    f"the trained model has {len(trained):,} words and is {trained.shape[1]} wide, the one to adapt "
                    f"{len(parameter):,} and {parameter.shape[1]}: shape and tokenizer must be the same"
                )
            trained = trained[: len(parameter)]
        if trained is not None and trained.shape == parameter.shape:
            parameter.copy_(trained)
        else:
            own.append(name)
    pairs = list(zip(source.layers, target.layers, strict=True))
    converters = [_converter(*pair) for pair in pairs]
    moments = _moments(source, [n for n, convert in enumerate(converters) if convert], batches)
    for number, (pair, convert) in enumerate(zip(pairs, converters, strict=True)):
        if convert is not None:
            convert(*pair, *moments[number])
            own = [name for name in own if name.rpartition(".")[0] not in _made_by(convert, number)]
    return own


def check_residuals(theirs: Iterable[bool], target: TransformerLM) -> None:
    """Raises UserError where an MLP would read something else than the trained one did.

    theirs: of each trained layer whether its residual is parallel, see `PythiaLayer`.
    """
    for number, (parallel, layer) in enumerate(zip(theirs, target.layers, strict=False)):
        if getattr(layer, "parallel_residual", True) != parallel:
            option = f"parallel_residual={str(parallel).lower()}"
            raise UserError(
                f"layer {number} of the trained model has {option}, and that of the one to adapt has not, so that its "
                f"MLP would read something else: take layers that have, as in pythia:{option}"
            )


Converter = Callable[..., None]
"""Takes both layers, and mean (2 D) and covariance (2 D, 2 D), in float64, of the trained one's keys and values."""


def _converter(source: nn.Module, target: nn.Module) -> Converter | None:
    """How a layer's attention is made; None where names and shapes have done it, or nothing can."""
    if type(source) is not PythiaLayer or source.num_kv_heads != source.num_heads:
        return None
    if type(target) is MLALayer:
        return _latents
    plain = isinstance(target, PythiaLayer) and target.head_size == source.head_size
    if type(target) is VDProjLayer and plain and target.restore == "none" and target.num_kv_heads == source.num_heads:
        return _narrow_values
    if type(target) is PythiaLayer and target.num_kv_heads < source.num_heads:
        return _fewer_heads
    return None


def _made_by(convert: Converter, number: int) -> set[str]:
    parts = ("project", "expand") if convert is _latents else ("qkv", "out")
    return {f"layers.{number}.{part}" for part in parts}


def _moments(source: TransformerLM, numbers: list[int], batches: Iterable[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and covariance of keys and values, before any rotation, of these layers over the batches, in float64.

    Over all that a layer reads: some models go through their layers several times.
    """
    counts, sums, products, hooks = dict.fromkeys(numbers, 0), {}, {}, []  # type: ignore[var-annotated]
    for n in numbers:
        layer = source.layers[n]
        assert isinstance(layer, PythiaLayer)
        width = sum(layer.widths) - layer.num_heads * layer.head_size
        sums[n] = torch.zeros(width, dtype=torch.float64, device=source.device)
        products[n] = torch.zeros(width, width, dtype=torch.float64, device=source.device)

        def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor, n: int = n) -> None:
            y = output.flatten(0, 1)[:, -len(sums[n]) :].double()
            counts[n] += len(y)
            sums[n] += y.sum(dim=0)
            products[n] += y.T @ y

        hooks.append(layer.qkv.register_forward_hook(add))
    try:
        for ids in batches if numbers else ():
            source.hidden_states(ids.to(source.device))
    finally:
        for hook in hooks:
            hook.remove()
    means = {n: total / counts[n] for n, total in sums.items()}
    return {n: (mean, products[n] / counts[n] - mean.outer(mean)) for n, mean in means.items()}


def directions(covariance: Tensor, rank: int) -> Tensor:
    """(n, rank): orthonormal, along which most of the variance (n, n) lies; zeros beyond n."""
    _, vectors = torch.linalg.eigh(covariance)  # ascending
    found = vectors.flip(1)[:, :rank]
    return torch.cat([found, found.new_zeros(len(found), rank - found.shape[1])], dim=1)


def _parts(source: PythiaLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of the queries, and those of keys and values together, in float64."""
    width = source.num_heads * source.head_size
    weight, bias = source.qkv.weight.double(), source.qkv.bias.double()
    return weight[:width], bias[:width], weight[width:], bias[width:]


def _latents(source: PythiaLayer, target: MLALayer, mean: Tensor, covariance: Tensor) -> None:
    w_q, b_q, w, b = _parts(source)
    basis = directions(covariance, target.kv_dim)  # (2 D, r)
    # Scores are divided by √(d + p) where the trained ones were by √d; the rotary part begins with queries of zero.
    larger = (target.head_size**-0.5) / target.scale
    rotary = target.num_heads * target.rope_dim
    rows = target.project.weight.split([len(w_q), rotary, target.rope_dim, target.kv_dim])
    biases = target.project.bias.split([len(w_q), rotary, target.rope_dim, target.kv_dim])
    rows[0].copy_(w_q * larger)
    biases[0].copy_(b_q * larger)
    rows[1].zero_()
    biases[1].zero_()
    rows[3].copy_(basis.T @ w)
    biases[3].copy_(basis.T @ (b - mean))
    target.expand.weight.copy_(basis)
    _shift_output(target.out, source, mean)


def _narrow_values(source: PythiaLayer, target: VDProjLayer, mean: Tensor, covariance: Tensor) -> None:
    w_q, b_q, w, b = _parts(source)
    keys = source.num_heads * source.head_size
    weights, biases, outputs = [w_q, w[:keys]], [b_q, b[:keys]], []
    for rows, out in zip(
        torch.arange(keys, 2 * keys, device=w.device).split(source.value_size),
        source.out.weight.double().split(source.value_size, dim=1),
        strict=True,
    ):
        basis = directions(covariance[rows][:, rows], target.value_size)  # (d, dv)
        weights.append(basis.T @ w[rows])
        biases.append(basis.T @ (b[rows] - mean[rows]))
        outputs.append(out @ basis)
    target.qkv.weight.copy_(torch.cat(weights))
    target.qkv.bias.copy_(torch.cat(biases))
    target.out.weight.copy_(torch.cat(outputs, dim=1))
    _shift_output(target.out, source, mean)


def _shift_output(out: nn.Linear, source: PythiaLayer, mean: Tensor) -> None:
    """Attention's weights add up to one: the mean value comes out of it as it went in."""
    values = mean[-source.out.in_features :]
    out.bias.copy_(source.out.bias.double() + source.out.weight.double() @ values)


def _fewer_heads(source: PythiaLayer, target: PythiaLayer, mean: Tensor, covariance: Tensor) -> None:
    w_q, b_q, w, b = _parts(source)

    def pooled(x: Tensor) -> Tensor:
        """(2·H·d, …) to (2·Hk·d, …): keys and values, of each head the mean over its group."""
        groups = x.unflatten(0, (2, target.num_kv_heads, -1, source.head_size))
        return groups.mean(dim=2).flatten(0, 2)

    target.qkv.weight.copy_(torch.cat([w_q, pooled(w)]))
    target.qkv.bias.copy_(torch.cat([b_q, pooled(b)]))
