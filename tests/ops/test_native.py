"""Our own kernels: the numbers of their twins, whatever the instructions they are compiled to."""

import logging
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from newllm.models.linear import Linear
from newllm.ops import attention, loss, native, reference
from newllm.ops.linear import FEW_ROWS, linear
from newllm.ops.loss import IGNORED, linear_cross_entropy
from newllm.ops.quantize import BITS, Quantized, quantize

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
NATIVE_FLAGS = native.FLAGS
# The plainest instructions of this machine's kind, and where there is a product of bfloat16 numbers, all but that.
BUILDS = {
    "native": NATIVE_FLAGS,
    "plain": tuple(flag for flag in NATIVE_FLAGS if flag != "-march=native"),
    "no bfloat16": (*NATIVE_FLAGS, "-mno-avx512bf16"),
}


def test_only_few_plain_rows_without_gradient_take_the_kernel(monkeypatch):
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    calls, kernel = [], native.linear
    monkeypatch.setattr(native, "linear", lambda *arguments: calls.append(1) or kernel(*arguments))

    def takes_it(layer, x):
        calls.clear()
        layer(x)
        return bool(calls)

    layer, row = Linear(64, 32), torch.randn(1, 64)
    assert not takes_it(layer, row)  # gradients are wanted
    with torch.no_grad():
        assert takes_it(layer, row)
        assert not takes_it(layer, torch.randn(FEW_ROWS + 1, 64))
        assert not takes_it(layer, torch.randn(0, 64))
        assert not takes_it(Linear(64, 32).double(), row.double())
        assert not takes_it(Linear(64, 32, device="meta"), row.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes_it(layer, row)
        transposed = Linear(64, 32)
        transposed.weight = nn.Parameter(torch.randn(64, 32).T)
        assert not takes_it(transposed, row)
        torch.testing.assert_close(transposed(row), row @ transposed.weight.T + transposed.bias)
    with torch.inference_mode():
        assert takes_it(Linear(64, 32), row)


@pytest.mark.parametrize("shape", [(1, 32), (2, 96), (1, 128), (3, 7), (64, 1), (64, 0), ()])
def test_a_wrong_width_is_refused_as_by_torch(shape):
    """The kernel takes its sizes from the weight: it would read and write past the ends of x and of the result."""
    x, weight = torch.randn(shape), torch.randn(32, 64)
    with pytest.raises(RuntimeError) as expected:
        F.linear(x, weight)
    with torch.no_grad(), pytest.raises(RuntimeError) as found:
        linear(x, weight)
    assert str(found.value) == str(expected.value)


def test_a_wrong_bias_is_refused_as_by_torch():
    x, weight = torch.randn(1, 64), torch.randn(32, 64)
    with torch.no_grad():
        for size in (31, 33):
            with pytest.raises(RuntimeError):
                linear(x, weight, torch.randn(size))
        torch.testing.assert_close(linear(x, weight, torch.ones(1)), F.linear(x, weight) + 1)


def test_what_is_traced_or_transformed_takes_torchs_operators():
    """A tracer would keep the kernel's first result as a constant; a tensor of vmap has no memory of its own."""
    layer, rows = Linear(64, 32), torch.randn(3, 1, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about the sizes
        expected = layer(rows)
        torch.testing.assert_close(torch.vmap(layer)(rows), expected)
        traced = torch.jit.trace(layer, torch.zeros(1, 64), check_trace=False)
        torch.testing.assert_close(traced(rows[0]), expected[0])
        q, k, v = torch.randn(3, 1, 4, 1, 8), torch.randn(3, 1, 2, 5, 8), torch.randn(3, 1, 2, 5, 8)
        attended = [attention.causal_attention(*row) for row in zip(q, k, v, strict=True)]
        torch.testing.assert_close(torch.vmap(attention.causal_attention)(q, k, v), torch.stack(attended))
        with forward_ad.dual_level():  # which torch.no_grad leaves on
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(rows, rows))).tangent
        torch.testing.assert_close(tangent, expected - layer.bias)


def decoded():
    torch.manual_seed(0)
    with torch.no_grad():
        return Linear(50, 20)(torch.randn(3, 50))


def trained_on():
    torch.manual_seed(0)
    return linear_cross_entropy(torch.randn(9, 16).bfloat16(), torch.randn(40, 16).bfloat16(), torch.arange(9))


@pytest.mark.parametrize(
    ("library", "computed", "what"),
    [(native.library, decoded, "decoding"), (native.loss_library, trained_on, "the loss in bf16")],
)
def test_without_a_compiler_torch_does_the_same(monkeypatch, tmp_path, caplog, library, computed, what):
    expected = computed()
    library.cache_clear()
    try:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setenv("PATH", str(tmp_path))
            patch.delenv("CXX", raising=False)
            assert library() is None
            torch.testing.assert_close(computed(), expected)
        assert [record.getMessage() for record in caplog.records] == [
            f"{what} takes torch's own operators, which are slower: no C++ compiler is installed (set CXX to one)"
        ]
        library.cache_clear()
        monkeypatch.setenv("NEWLLM_NATIVE", "0")
        assert library() is None
    finally:
        library.cache_clear()


def test_what_does_not_compile_leaves_nothing(tmp_path):
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return nothing; }")
    with pytest.raises(native.subprocess.SubprocessError):
        native.build(source, tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


def skip_what_cannot_be_built(name, library=native.library):
    if library() is None:
        pytest.skip("no C++ compiler here")
    if name == "no bfloat16" and "avx512_bf16" not in native._processor():
        pytest.skip("no such instruction here")


@pytest.fixture(scope="module", params=BUILDS)
def kernels(request, tmp_path_factory):
    skip_what_cannot_be_built(request.param)
    library = native.load(native.build(native.DECODE, native.cache_folder() / "kernels", BUILDS[request.param]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: library)
        yield library


def error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def test_the_kernels_are_never_given_shapes_that_do_not_fit(kernels):
    row, weight = torch.randn(1, 64), torch.randn(32, 64)
    with pytest.raises(AssertionError):
        native.linear(row[:, :32], weight, None)
    with pytest.raises(AssertionError):
        native.linear(row, weight, torch.randn(31))
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    for wrong in (
        (q[..., :7], k, v),
        (q, k[:, :, :4], v),
        (q, k[:1], v[:1]),
        (q[:, :3], k, v),
        (q.expand(2, 4, 2, 8), k, v),
    ):
        with pytest.raises(AssertionError):
            native.attention(*wrong, None, None, 0, 1.0)


@given(
    rows=st.integers(1, FEW_ROWS),
    size_in=st.integers(1, 150),
    size_out=st.integers(1, 40),
    dtype=st.sampled_from(native.DTYPES),
    bias=st.booleans(),
)
def test_linear_equals_torch(kernels, rows, size_in, size_out, dtype, bias):
    torch.manual_seed(0)
    layer = Linear(size_in, size_out, bias=bias).to(dtype)
    x = torch.randn(2, FEW_ROWS, size_in).to(dtype)[:1, :rows]
    expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.no_grad():
        assert native.usable(x, layer.weight)
        found = layer(x)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert error(found, expected) < TOLERANCE[dtype] * 2


@st.composite
def cases(draw):
    H, Hk = draw(st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1), (15, 1)]))
    d, dv = draw(st.sampled_from([(8, 8), (64, 64), (32, 5), (33, 40), (144, 144), (128, 100), (16, 70), (70, 16)]))
    S = draw(st.sampled_from([1, 2, 63, 64, 65, 255, 256, 257, 600]))
    return H, Hk, S, d, dv


@given(
    case=cases(),
    dtype=st.sampled_from(native.DTYPES),
    slopes=st.sampled_from([None, "one", "each"]),
    masked=st.booleans(),
    window=st.sampled_from([None, 1, 70, 1000]),
    seed=st.integers(0, 9),
)
def test_attention_equals_its_naive_twin(kernels, case, dtype, slopes, masked, window, seed):
    (H, Hk, S, d, dv), B = case, 2
    torch.manual_seed(seed)
    q = torch.randn(B, 1, H, d).to(dtype).transpose(1, 2)
    # Views of longer buffers; what stands behind them is not to be read.
    k, v = (torch.full((B, Hk, S + 3, size), torch.nan).to(dtype) for size in (d, dv))
    k, v = k[:, :, :S].normal_(), v[:, :, :S].normal_()
    slopes = {None: None, "one": torch.tensor([0.06]), "each": torch.rand(H)}[slopes]
    mask = torch.rand(B, S) < 0.5 if masked else None
    with torch.no_grad():
        assert native.usable(q, k, v)
        found = attention.causal_attention(q, k, v, slopes=slopes, mask=mask, window=window)
    expected = attention._direct(q.double(), k.double(), v.double(), slopes, window, mask, None)
    assert error(found, expected) < TOLERANCE[dtype] * 3


@given(
    case=cases(),
    bits=st.sampled_from(list(BITS.values())),
    dtype=st.sampled_from(native.DTYPES),
    masked=st.booleans(),
    window=st.sampled_from([None, 1, 70]),
    seed=st.integers(0, 9),
)
def test_attention_to_codes_equals_that_to_their_numbers(kernels, case, bits, dtype, masked, window, seed):
    (H, Hk, S, d, dv), B = case, 2
    torch.manual_seed(seed)
    q, slopes = torch.randn(B, H, 1, d).to(dtype), torch.rand(H)
    # Views of longer buffers; what stands behind them is not to be read.
    k, v = (
        Quantized(*(x[:, :, :S] for x in quantize(torch.randn(B, Hk, S + 3, size), bits)), bits, size)
        for size in (d, dv)
    )
    mask = torch.rand(B, S) < 0.5 if masked else None
    with torch.no_grad():
        assert native.reads(q, k, v)
        found = attention.causal_attention(q, k, v, slopes=slopes, mask=mask, window=window)
    numbers = (x.numbers(torch.float64) for x in (k, v))
    assert found.dtype == dtype
    assert error(found, attention._direct(q.double(), *numbers, slopes, window, mask, None)) < TOLERANCE[dtype] * 3


def test_codes_are_made_numbers_where_the_kernel_cannot_read_them(monkeypatch):
    """Several queries, other devices, no compiler: the same attention; and a latent, key and value at once, once."""
    torch.manual_seed(0)
    latent = Quantized(*quantize(torch.randn(2, 1, 20, 24), 8), 8, 24)
    made, numbers = [], Quantized.numbers
    monkeypatch.setattr(Quantized, "numbers", lambda self, dtype: made.append(1) or numbers(self, dtype))
    for queries in (1, 3, 15):
        q = torch.randn(2, 4, queries, 24)
        found = attention.causal_attention(q, latent, latent)  # gradients are wanted: no kernel
        whole = numbers(latent, q.dtype)
        torch.testing.assert_close(found, attention.causal_attention(q, whole, whole))
    assert len(made) == 3


def test_attention_of_a_few_equals_the_reference(kernels):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16) for heads, length in ((4, 1), (2, 9), (2, 9)))
    options = {"slopes": torch.rand(4), "mask": torch.rand(2, 9) < 0.5, "window": 3, "scale": 0.4}
    with torch.no_grad():
        found = attention.causal_attention(q, k, v, **options)
    assert error(found, reference.attention(q.double(), k.double(), v.double(), **options)) < 1e-6


def test_sums_depend_on_neither_threads_nor_other_rows(kernels):
    torch.manual_seed(0)
    x, layer = torch.randn(13, 300), Linear(300, 200)
    q, k, v = torch.randn(5, 8, 1, 64), torch.randn(5, 1, 900, 64), torch.randn(5, 1, 900, 64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                product, mixed = layer(x), attention.causal_attention(q, k, v)
                for row in range(5):
                    one = slice(row, row + 1)
                    assert torch.equal(layer(x[one]), product[one])
                    assert torch.equal(attention.causal_attention(q[one], k[one], v[one]), mixed[one])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_nan_and_infinity_are_not_lost(kernels, dtype):
    layer, x = Linear(40, 9).to(dtype), torch.zeros(1, 40, dtype=dtype)
    k = torch.randn(1, 1, 80, 40).to(dtype)
    with torch.no_grad():
        for value in (torch.nan, torch.inf):
            assert not layer(torch.full_like(x, value)).isfinite().any()
            assert not attention.causal_attention(torch.full((1, 2, 1, 40), value, dtype=dtype), k, k).isfinite().any()
        spoilt = torch.randn(1, 1, 9, 40)
        spoilt[0, 0, 4, 7] = torch.nan
        codes = Quantized(*quantize(spoilt, 8), 8, 40)
        whole = attention.causal_attention(torch.zeros(1, 2, 1, 40, dtype=dtype), codes, codes)
        assert whole[..., :32].isnan().all()
        # Scores far apart: the largest alone counts.
        q = torch.zeros(1, 1, 1, 40, dtype=dtype)
        q[..., 0], k[..., 0] = 1e4, torch.arange(80) / 64
        found = attention.causal_attention(q, k, k)
        torch.testing.assert_close(found[0, 0, 0], k[0, 0, -1])


@pytest.fixture(scope="module", params=["native", "plain"])
def loss_kernel(request):
    skip_what_cannot_be_built(request.param, native.loss_library)
    library = native.load_loss(
        native.build(native.CROSS_ENTROPY, native.cache_folder() / "kernels", BUILDS[request.param])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "loss_library", lambda: library)
        yield library


@given(
    rows=st.integers(0, 9),
    words=st.integers(1, 140),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    shift=st.sampled_from([0.0, -500.0, 3e38]),
    seed=st.integers(0, 99),
)
def test_cross_entropy_and_its_gradient_equal_their_naive_twin(loss_kernel, rows, words, spread, shift, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(rows, words) * spread + shift).bfloat16()
    targets = torch.randint(words, (rows,)).where(torch.rand(rows) < 0.8, torch.tensor(IGNORED))
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none", ignore_index=IGNORED)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    spared = logits.clone()
    losses = native.cross_entropy(spared, targets, IGNORED, gradient=False)
    found = native.cross_entropy(logits, targets, IGNORED, gradient=True)
    assert torch.equal(losses, found)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(logits.double(), slope, rtol=2**-8, atol=1e-6)
    assert torch.equal(spared, wide.detach().bfloat16())  # nothing is written where no gradient is wanted


def test_losses_are_the_same_with_any_number_of_threads(loss_kernel):
    logits, targets = torch.randn(37, 1001).bfloat16(), torch.randint(1001, (37,))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            gradient = logits.clone()
            found.append((native.cross_entropy(gradient, targets, IGNORED, gradient=True), gradient))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_give_a_loss_that_is_none(loss_kernel, value):
    logits, targets = torch.randn(3, 70).bfloat16(), torch.tensor([5, 6, 7])
    logits[1, 64] = value
    losses = native.cross_entropy(logits, targets, IGNORED, gradient=True)
    assert losses.isfinite().tolist() == [True, False, True]
    assert logits.isfinite().all(dim=1).tolist() == [True, False, True]


def test_a_word_of_no_probability_costs_infinitely_much_and_others_nothing(loss_kernel):
    logits = torch.full((2, 40), -torch.inf, dtype=torch.bfloat16)
    logits[:, 3] = 0.0
    losses = native.cross_entropy(logits, torch.tensor([3, 4]), IGNORED, gradient=False)
    assert losses.tolist() == [0, torch.inf]


@pytest.mark.parametrize("target", [40, -1, -101])
def test_targets_that_are_no_words_are_refused_before_anything_is_written(loss_kernel, target):
    with pytest.raises(IndexError, match="from 0 to 39"):
        native.cross_entropy(torch.zeros(2, 40).bfloat16(), torch.tensor([0, target]), IGNORED, gradient=True)


def test_only_plain_bf16_logits_and_as_many_plain_targets_take_the_kernel(loss_kernel):
    logits, targets = torch.zeros(4, 40, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    assert native.takes_logits(logits, targets)
    for other in (logits.float(), logits[:, :30], logits.T, logits.to("meta"), logits[None]):
        assert not native.takes_logits(other, targets)
    for other in (targets[:3], targets.int(), targets.to("meta"), targets[:, None]):
        assert not native.takes_logits(logits, other)
        with pytest.raises(AssertionError):
            native.cross_entropy(logits, other, IGNORED, gradient=False)
    with FlopCounterMode(display=False):  # sees every operator of torch
        assert not native.takes_logits(logits, targets)


@pytest.mark.parametrize("ambient", [torch.float16, torch.float64, torch.device("meta")])
def test_what_new_tensors_are_by_default_does_not_matter(loss_kernel, ambient):
    logits, targets = torch.randn(300, 40).bfloat16(), torch.randint(40, (300,))
    expected = native.cross_entropy(logits.clone(), targets, IGNORED, gradient=True)
    try:
        (torch.set_default_device if isinstance(ambient, torch.device) else torch.set_default_dtype)(ambient)
        assert torch.equal(native.cross_entropy(logits, targets, IGNORED, gradient=True), expected)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_of_bf16_takes_the_kernel_and_equals_that_without(loss_kernel, monkeypatch, shared):
    """Over several blocks of rows, with labels that are ignored and, where shared, with what each loss counts."""
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "ROWS", 16)
    calls, kernel = [], native.cross_entropy
    monkeypatch.setattr(native, "cross_entropy", lambda *args: calls.append(1) or kernel(*args))
    hidden, weight = (torch.randn(n, 24).bfloat16().requires_grad_() for n in (40, 77))
    targets = torch.randint(77, (40,)).where(torch.rand(40) < 0.8, torch.tensor(IGNORED))
    inputs = (hidden, weight, torch.rand(40, requires_grad=True))[: 3 if shared else 2]

    def computed():
        each = linear_cross_entropy(hidden, weight, targets, "none")
        total = linear_cross_entropy(hidden, weight, targets, shares=inputs[2] if shared else None)
        return each, total, *torch.autograd.grad(total, inputs)

    own = computed()
    assert len(calls) == 6
    monkeypatch.setattr(native, "loss_library", lambda: None)
    for ours, torchs in zip(own, computed(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2**-6, atol=2**-6 if ours.dtype == torch.bfloat16 else 1e-5)
    assert len(calls) == 6


def test_a_transform_of_targets_takes_torchs_operators(loss_kernel):
    hidden, weight, targets = torch.randn(8, 16).bfloat16(), torch.randn(40, 16).bfloat16(), torch.randint(40, (3, 8))
    each = torch.vmap(lambda rows: loss._losses(hidden @ weight.T, rows, gradient=False))(targets)
    torch.testing.assert_close(each[1], linear_cross_entropy(hidden, weight, targets[1], "none"))
