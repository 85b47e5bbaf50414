"""Multi-head latent attention: two paths and a twin that agree, a cache of latents alone, and what it refuses."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from newllm.errors import UserError
from newllm.evaluation import cache_bytes
from newllm.models import create_model, load_model
from newllm.models.layers import MLALayer, PythiaLayer, create_layer
from newllm.models.transformer import TransformerLM
from newllm.ops import attention, blocked_attention, native, reference
from newllm.ops.quantize import BITS

POSITIONS = {
    "uniform": {},
    "geometric": {"position": {"type": "alibi", "slopes": "geometric"}},
    "nope": {"position": "none"},
    "rope": {"rope_dim": 6},
    "rope and ALiBi": {"rope_dim": 4, "position": "alibi"},
}
PATHS = ("absorbed", "materialised")


def layers_of(paths=PATHS, dtype=torch.float64, **options):
    """The same weights once for each path: far from the initial, nearly uniform attention."""
    layers = [MLALayer(64, 4, 80, path=path, **options).to(dtype) for path in paths]
    for parameter in layers[0].parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    return layers


def read(layer, x, sizes, mask=None, precision="model"):
    """Reads x (B, T, D) in chunks through a state."""
    state, outputs, start = layer.make_state(), [], 0
    state.precision = precision
    positions = positions_of(x, mask)
    for stop in itertools.accumulate(sizes):
        chunk_mask = None if mask is None else mask[:, :stop]
        outputs.append(layer(x[:, start:stop], positions=positions[:, start:stop], mask=chunk_mask, state=state))
        start = stop
    return torch.cat(outputs, dim=1)


def positions_of(x, mask):
    B, T = x.shape[:2]
    return torch.arange(T).expand(B, T) if mask is None else (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def left_padding(B, T, pads):
    return torch.arange(T).expand(B, T) >= torch.tensor(pads)[:, None]


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    pads = draw(st.none() | st.lists(st.integers(0, sum(sizes) - 1), min_size=2, max_size=2))
    return draw(st.sampled_from(list(POSITIONS))), draw(st.sampled_from([5, 16, 37])), sizes, pads


@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.float32]), block=st.sampled_from([4, 512]))
def test_absorbed_equals_materialised_equals_naive_at_any_split(case, dtype, block):
    position, kv_dim, sizes, pads = case
    options = {"kv_dim": kv_dim, **POSITIONS[position]}
    T, tolerance = sum(sizes), {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    x = torch.randn(2, T, 64, dtype=dtype)
    mask = None if pads is None else left_padding(2, T, pads)
    real = torch.ones(2, T, dtype=torch.bool) if mask is None else mask
    absorbed, materialised = layers_of(dtype=dtype, **options)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        naive = absorbed.reference(x, positions=positions_of(x, mask), mask=mask)[real]
        for layer in (absorbed, materialised):
            whole = layer(x, positions=positions_of(x, mask), mask=mask, state=None)[real]
            for output in (whole, read(layer, x, sizes, mask)[real]):
                assert (output - naive).abs().max() <= tolerance * naive.abs().max()


@pytest.mark.parametrize("position", list(POSITIONS))
def test_gradients_are_the_same_on_both_paths(position):
    x = torch.randn(2, 12, 64, dtype=torch.float64)
    gradients = []
    for layer in layers_of(kv_dim=24, **POSITIONS[position]):
        output = read(layer, x, [7, 4, 1])
        gradients.append(torch.autograd.grad(output.square().sum(), list(layer.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["uniform", "geometric", "nope"])
@pytest.mark.parametrize("precision", list(BITS))
def test_on_quantised_latents_both_paths_equal_the_naive_twin_on_the_same_codes(scheme, precision):
    x, sizes = torch.randn(2, 14, 64, dtype=torch.float64), [9, 1, 1, 3]
    mask = left_padding(2, 14, [0, 5])
    absorbed, materialised = layers_of(kv_dim=40, **POSITIONS[scheme])

    def quantised(module, inputs, projected):
        q, latent = projected.flatten(0, 1).split([64, 40], dim=-1)
        latent = reference.quantize_and_back(latent, BITS[precision], size=32)
        return torch.cat([q, latent], dim=-1).view_as(projected)

    with torch.no_grad():
        exact = absorbed.reference(x, positions=positions_of(x, mask), mask=mask)
        hook = absorbed.project.register_forward_hook(quantised)
        naive = absorbed.reference(x, positions=positions_of(x, mask), mask=mask)
        hook.remove()
        outputs = [read(layer, x, sizes, mask, precision) for layer in (absorbed, materialised)]
    for output in outputs:
        torch.testing.assert_close(output[mask], naive[mask], rtol=1e-10, atol=1e-10)
    # The quantiser's error: half a step of 1/127 or 1/7 of a group's largest number, through one layer.
    error = (outputs[0] - exact)[mask].norm() / exact[mask].norm()
    assert 0 < error < {"int8": 0.01, "int4": 0.2}[precision]


@pytest.mark.parametrize("precision", list(BITS))
def test_a_quantised_rotary_key_is_the_same_on_both_paths(precision):
    x, sizes = torch.randn(2, 14, 64, dtype=torch.float64), [9, 1, 1, 3]
    with torch.no_grad():
        absorbed, materialised = (
            read(layer, x, sizes, precision=precision) for layer in layers_of(kv_dim=40, rope_dim=6)
        )
    torch.testing.assert_close(absorbed, materialised, rtol=1e-10, atol=1e-10)


@given(keys=st.integers(1, 200), kv_dim=st.integers(1, 48), whole=st.booleans())
def test_auto_takes_the_path_that_multiplies_less(keys, kv_dim, whole):
    """Counted by torch: one token at the end of `keys`, or all of them at once."""
    queries, operations = keys if whole else 1, {}
    for path in ("auto", *PATHS):
        layer = MLALayer(64, 4, 80, kv_dim=kv_dim, path=path)
        cached, q = torch.zeros(1, 1, keys, kv_dim), torch.zeros(1, queries, 4, 16)
        attend = layer._absorbed if layer.absorbs(queries, keys) else layer._materialised
        with torch.no_grad(), FlopCounterMode(display=False) as counter, pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "DIRECT_QUERIES", keys)  # plain products, which torch counts
            patch.setattr(native, "library", lambda: None)
            attend(q, None, cached, None)
        operations[path] = counter.get_total_flops()
    assert operations["auto"] == min(operations["absorbed"], operations["materialised"])


def test_a_decoding_step_does_not_expand_the_past(monkeypatch):
    """Its work grows by scores and mixtures over the latents alone: 2 products of H · r for each token of the past."""
    monkeypatch.setattr(native, "library", lambda: None)  # torch counts its own products only
    layer, steps = MLALayer(64, 4, 80, kv_dim=24), []
    for past in (300, 400):
        x, state = torch.randn(1, past + 1, 64), layer.make_state()
        positions = torch.arange(past + 1)[None]
        with torch.no_grad():
            layer(x[:, :past], positions=positions[:, :past], mask=None, state=state)
            with FlopCounterMode(display=False) as counter:
                layer(x[:, past:], positions=positions[:, past:], mask=None, state=state)
        steps.append(counter.get_total_flops())
    assert steps[1] - steps[0] == 100 * 2 * 2 * 4 * 24


@pytest.mark.parametrize(
    ("preset", "precision", "expected"),
    [
        ("mla_64", "model", 768),
        ("mla", "model", 1536),
        ("mla_256", "model", 3072),
        ("mla_rope", "model", 1728),
        ("mla", "int8", 6 * (128 + 2 * 4)),
        ("mla", "int4", 6 * (64 + 2 * 4)),
    ],
)
def test_measured_bytes_of_a_token_at_the_70m_shape(preset, precision, expected):
    # The MLP's width plays no part.
    model = create_model(preset, vocab_size=64, intermediate_size=8, cache_precision=precision).bfloat16().eval()
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.randint(64, (1, 10)), past_key_values=cache)
    assert cache_bytes(cache).used == 10 * expected


@pytest.mark.parametrize("preset", ["mla_64", "mla", "mla_256", "mla_rope"])
def test_queries_keys_and_values_start_with_the_variance_of_the_baseline(preset):
    shape = {"num_layers": 1, "vocab_size": 64, "intermediate_size": 8}
    x = torch.randn(2, 40, 512)
    baseline = create_model("pythia", **shape).layers[0]
    layer = create_model(preset, **shape).layers[0]
    with torch.no_grad():
        expected = [part.std() for part in baseline.qkv(baseline.norm_attention(x)).chunk(3, dim=-1)]
        q, *_, latent = layer.project(layer.norm_attention(x)).split(layer.widths, dim=-1)
        ours = [part.std() for part in (q, *layer.expand(latent).chunk(2, dim=-1))]
    for a, b in zip(ours, expected, strict=True):
        assert abs(a / b - 1) < 0.05


def test_loading_keeps_the_weights_and_starts_from_no_others(tmp_path):
    model = create_model("mla_rope", hidden_size=64, num_heads=4, intermediate_size=80, num_layers=2, vocab_size=61)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"rope_dim": 16}], ids=str)
def test_under_autocast_every_product_is_bf16(path, options, monkeypatch):
    monkeypatch.setattr(blocked_attention, "usable", lambda *_: False)  # its scores are float32: here the layer's own

    class Products(TorchDispatchMode):
        dtypes: set[torch.dtype] = set()  # noqa: RUF012

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                self.dtypes.add(result.dtype)
            return result

    layer = MLALayer(512, 8, 2048, path=path, **options)
    x = torch.randn(2, 16, 512, requires_grad=True)
    with Products() as products:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x, positions=torch.arange(16).expand(2, 16), mask=None, state=None)
        output.sum().backward()
    assert products.dtypes == {torch.bfloat16}
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"rope_dim": 16}], ids=str)
def test_under_autocast_quantised_latents_are_read_by_few_and_many_queries(path, options):
    layer, x, sizes = MLALayer(64, 4, 128, path=path, **options), torch.randn(2, 24, 64), [3, 1, 20]
    with torch.no_grad():
        exact = read(layer, x, sizes, precision="int8") - x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = read(layer, x, sizes, precision="int8") - x
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("options", [{}, {"rope_dim": 16}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_in_bf16_is_float32_to_bf16s_rounding(options, batch):
    layer = MLALayer(512, 8, 2048, **options)
    x = torch.randn(batch, 30, 512)
    sizes = [20, *[1] * 10]  # the buffers grow on the way
    with torch.no_grad():
        exact = read(layer, x, sizes) - x
        rounded = read(layer.bfloat16(), x.bfloat16(), sizes) - x
    assert (rounded - exact).abs().max() < 0.03 * exact.abs().max()


def test_built_positionally_it_has_the_documented_defaults():
    layer = MLALayer(512, 8, 2048)
    uniform = {"type": "alibi", "slopes": "uniform", "slope": 0.0625}
    assert layer.spec == {
        "type": "mla",
        "hidden_size": 512,
        "num_heads": 8,
        "intermediate_size": 2048,
        "kv_dim": 128,
        "position": uniform,
        "rope_dim": 0,
        "rope_base": 10000.0,
        "path": "auto",
    }
    assert create_layer(layer.spec).spec == layer.spec
    assert MLALayer(512, 8, 2048, rope_dim=16).spec["position"] == {"type": "none"}
    model = TransformerLM(layers=[layer, PythiaLayer(512, 8, 2048)], vocab_size=64)
    assert [spec["type"] for spec in model.config.layer_specs] == ["mla", "pythia"]


def test_options_reach_the_layers_of_a_preset():
    shape = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 80, "num_layers": 2, "vocab_size": 61}
    assert create_model("mla", kv_dim=64, **shape).layers[1].kv_dim == 64
    rotary = create_model("mla:rope_dim=4", **shape).layers[0]
    assert (rotary.rope_dim, rotary.position.type) == (4, "none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_dim": 0}, "kv_dim is 0"),
        ({"kv_dim": 1.5}, "kv_dim is 1.5"),
        ({"rope_dim": 3}, "rope_dim is 3: it must be 0 or an even number"),
        ({"rope_dim": -2}, "rope_dim is -2"),
        ({"rope_base": 0, "rope_dim": 4}, "base is 0"),
        ({"path": "absorb"}, "absorbed"),
        ({"position": "rope"}, "set rope_dim=16"),
        ({"position": "alibbi"}, "alibi"),
        ({"num_heads": 7}, "num_heads 7"),
        ({"kv_dims": 4}, "kv_dim"),
    ],
)
def test_wrong_options_are_named(options, words):
    shape = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 80}
    with pytest.raises(UserError, match=words):
        create_layer({"type": "mla", **shape, **options})
