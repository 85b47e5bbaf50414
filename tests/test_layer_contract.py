"""The one contract, over every layer type in the registry, in float64. A new layer type is found by itself."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.evaluation import cache_bytes
from newllm.evaluation.checks import CHECK_SHAPE, check_layer_types, check_model
from newllm.evaluation.contract import CHECKS
from newllm.models import create_model, preset_names
from newllm.models.cache import LMCache, bytes_of
from newllm.models.layers import LAYER_TYPES, create_layer

SHAPE = {name: CHECK_SHAPE[name] for name in ("hidden_size", "num_heads", "intermediate_size")}
VARIANTS = [
    (name, options)
    for name, cls in LAYER_TYPES.items()
    if cls.__module__.startswith("newllm.models")
    for options in ({}, *cls.variants)
]
layers = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))


def make(name, options):
    layer = create_layer({"type": name, **SHAPE, **options}).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def read(layer, x, sizes, mask=None, positions=None):
    """Reads x (B, T, D) in chunks of the given sizes; None reads it all at once without state."""
    B, T = x.shape[:2]
    positions = torch.arange(T).expand(B, T) if positions is None else positions
    if sizes is None:
        return layer(x, positions=positions, mask=mask, state=None)
    state, outputs = layer.make_state(), []
    stops = list(itertools.accumulate(sizes))
    for start, stop in zip([0, *stops], stops, strict=False):
        chunk_mask = None if mask is None else mask[:, :stop]
        outputs.append(layer(x[:, start:stop], positions=positions[:, start:stop], mask=chunk_mask, state=state))
    return torch.cat(outputs, dim=1)


@st.composite
def splits(draw, most=20):
    total = draw(st.integers(1, most))
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_keeps_the_whole_contract(preset):
    results = check_layer_types([preset])[preset]
    assert [result.name for result in results] == list(CHECKS)
    assert [result for result in results if result.passed is not True] == []


@layers
def test_every_variant_keeps_the_whole_contract(name, options):
    results = check_layer_types([name], **options)[name]
    assert [result for result in results if result.passed is not True] == []


@layers
def test_naive_twin_equals_parallel_in_outputs_and_gradients(name, options):
    layer = make(name, options)
    x = torch.randn(2, 9, SHAPE["hidden_size"], dtype=torch.float64, requires_grad=True)
    positions = torch.arange(9).expand(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:6] = mask[1, :3] = mask[1, 7] = False
    for m in (None, mask):
        real = torch.ones(2, 9, dtype=torch.bool) if m is None else m
        weight = torch.randn(2, 9, 1, dtype=torch.float64) * real[..., None]
        fast = layer(x, positions=positions, mask=m, state=None)
        slow = layer.reference(x, positions=positions, mask=m)
        torch.testing.assert_close(fast[real], slow[real], rtol=1e-10, atol=1e-10)
        wanted = [x, *layer.parameters()]
        for ours, theirs in zip(
            torch.autograd.grad((fast * weight).sum(), wanted, materialize_grads=True),
            torch.autograd.grad((slow * weight).sum(), wanted, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@layers
@given(sizes=splits(), batch=st.integers(1, 3))
def test_chunked_at_any_split_equals_parallel_in_outputs_and_gradients(name, options, sizes, batch):
    torch.manual_seed(sum(sizes))
    layer = make(name, options)
    x = torch.randn(batch, sum(sizes), SHAPE["hidden_size"], dtype=torch.float64, requires_grad=True)
    whole, chunked = read(layer, x, None), read(layer, x, sizes)
    torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(whole)
    wanted = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((chunked * weight).sum(), wanted, materialize_grads=True),
        torch.autograd.grad((whole * weight).sum(), wanted, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # the preallocated buffers, which training does not use
        torch.testing.assert_close(read(layer, x, sizes), whole, rtol=1e-10, atol=1e-10)


@layers
def test_no_gradient_from_the_future_or_from_other_rows(name, options):
    layer = make(name, options)
    x = torch.randn(2, 11, SHAPE["hidden_size"], dtype=torch.float64, requires_grad=True)
    for t in (0, 4, 10):
        (gradient,) = torch.autograd.grad(read(layer, x, None)[0, t].sum(), x)
        assert gradient[0, t].abs().max() > 0
        assert not gradient[0, t + 1 :].any()
        assert not gradient[1].any()


@layers
@given(sizes=splits(16), data=st.data())
def test_padding_anywhere_changes_nothing_for_real_tokens(name, options, sizes, data):
    """Left of the text, right of it with more text to follow, in the midst of it, in rows of different lengths."""
    layer, T = make(name, options), sum(sizes)
    runs = st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=T, max_size=T)
    rows = [[real for real, length in data.draw(runs) for _ in range(length)][:T] for _ in range(2)]
    mask, x = torch.tensor(rows), torch.randn(2, T, SHAPE["hidden_size"], dtype=torch.float64)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for chunks in (None, sizes):
            padded = read(layer, x, chunks, mask, positions)
            for row, real in enumerate(mask):
                if real.any():
                    alone = read(layer, x[row, real][None], None)[0]
                    torch.testing.assert_close(padded[row, real], alone, rtol=1e-9, atol=1e-9)


@layers
@given(before=splits(10), after=splits(10))
def test_state_can_be_repeated_selected_exported_restored_and_detached(name, options, before, after):
    layer = make(name, options)
    first, second = sum(before), sum(after)
    x = torch.randn(2, first + second, SHAPE["hidden_size"], dtype=torch.float64)
    positions = torch.arange(first + second).expand(2, -1)
    with torch.no_grad():
        whole = read(layer, x, None)[:, first:]
        state = layer.make_state()
        layer(x[:, :first], positions=positions[:, :first], mask=None, state=state)
        restored = layer.make_state()
        restored.restore(state.export())
        assert restored.seen == first
        state.batch_repeat_interleave(2)
        state.batch_select_indices(torch.tensor([0, 3, 1]))
        state.detach_()
        rows = torch.tensor([0, 1, 0])
        again = layer(x[rows, first:], positions=positions[rows, first:], mask=None, state=state)
        torch.testing.assert_close(again, whole[rows], rtol=1e-10, atol=1e-10)
        once_more = layer(x[:, first:], positions=positions[:, first:], mask=None, state=restored)
        torch.testing.assert_close(once_more, whole, rtol=1e-10, atol=1e-10)


@layers
def test_a_reset_state_is_a_fresh_one(name, options):
    layer = make(name, options)
    x = torch.randn(2, 8, SHAPE["hidden_size"], dtype=torch.float64)
    positions = torch.arange(8).expand(2, 8)
    with torch.no_grad():
        state = layer.make_state()
        layer(torch.randn_like(x), positions=positions, mask=None, state=state)
        state.reset()
        assert state.seen == 0
        again = layer(x, positions=positions, mask=None, state=state)
        torch.testing.assert_close(again, read(layer, x, None), rtol=1e-10, atol=1e-10)


@layers
@given(tokens=st.integers(1, 70), batch=st.integers(1, 3))
def test_state_bytes_equal_their_closed_form_at_any_length(name, options, tokens, batch):
    layer = make(name, options).float()
    state = layer.make_state()
    with torch.no_grad():
        for t in range(tokens):
            x = torch.randn(batch, 1, SHAPE["hidden_size"])
            layer(x, positions=torch.full((batch, 1), t), mask=None, state=state)
    assert bytes_of(state.tensors().values()) == batch * layer.state_bytes(tokens, 4)
    assert state.seen == tokens


@layers
def test_after_a_prefill_no_more_is_allocated_than_the_state_needs(name, options):
    """No state is a view of something as long as the text."""
    layer, T = make(name, options).float(), 400
    state, x = layer.make_state(), torch.randn(2, T, SHAPE["hidden_size"])
    with torch.no_grad():
        layer(x, positions=torch.arange(T).expand(2, T), mask=None, state=state)
    used, allocated = cache_bytes(LMCache([state]))
    assert used == 2 * layer.state_bytes(T, 4)
    assert allocated <= 1.25 * used


@pytest.mark.parametrize("preset", preset_names())
def test_after_a_prefill_a_model_has_allocated_no_more_than_its_states_need(preset):
    model = create_model(preset, **CHECK_SHAPE).eval()
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.randint(61, (2, 100)), past_key_values=cache)
    used, allocated = cache_bytes(cache)
    assert used == 2 * sum(model.state_bytes(100, 4))
    assert allocated <= 1.25 * used


@layers
def test_beam_search_equals_beam_search_without_cache(name, options):
    model = create_model(name, **CHECK_SHAPE, **options).double().eval()
    prompt = torch.randint(61, (2, 6))
    beam = {"num_beams": 3, "max_new_tokens": 7, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with_cache = model.generate(prompt, **beam)
    assert torch.equal(with_cache, model.generate(prompt, **beam, use_cache=False))


@layers
def test_inference_mode_gives_the_same_logits(name, options):
    model = create_model(name, **CHECK_SHAPE, **options).eval()
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)


def test_generation_of_a_padded_batch_equals_row_by_row():
    model = create_model("pythia", **CHECK_SHAPE).double().eval()
    rows = [torch.randint(61, (n,)) for n in (3, 7)]
    padded = torch.stack([torch.nn.functional.pad(row, (7 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (7 - len(row), 0)) for row in rows])
    together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 7:]
    for row, made in zip(rows, together, strict=True):
        ids = row[None]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0, len(row) :], made)


def test_a_swapped_alibi_mask_is_caught(monkeypatch):
    """The mistake the check exists for: query and key exchanged in mask and bias, so that the future is let in."""
    from newllm.ops import attention

    right = attention.additive_mask

    def swapped(T, S, slopes, window, mask, like):
        return (
            right(T, S, slopes, window, mask, like).transpose(2, 3)
            if T == S
            else right(T, S, slopes, window, mask, like)
        )

    monkeypatch.setattr(attention, "additive_mask", swapped)
    results = {result.name: result for result in check_layer_types(["pythia_alibi"])["pythia_alibi"]}
    assert results["future"].passed is False
    assert "changing token 1 changes the logits of token 0, 1 before it" in results["future"].detail
    assert results["chunks"].passed is None  # would follow, so it is not judged


def test_a_model_with_nan_is_called_not_finite():
    model = create_model("pythia", **CHECK_SHAPE)
    model.layers[1].out.weight.data[0, 0] = float("nan")
    results = {result.name: result for result in check_model(model, tokens=24)}
    assert results["finite"].passed is False
    assert "layers.1.out.weight" in results["finite"].detail
