"""Quantised numbers: what comes back, how far off, and what it takes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.ops import reference
from newllm.ops.quantize import BITS, dequantize, quantize, vector_bytes

bits = st.sampled_from(list(BITS.values()))
sizes = st.integers(1, 150)


def there_and_back(x, bits):
    return dequantize(*quantize(x, bits), bits, x.shape[-1], x.dtype)


@given(bits=bits, size=sizes, exponent=st.integers(-3, 4), seed=st.integers(0, 99))
def test_what_comes_back_equals_the_twin_and_is_half_a_step_away_at_most(bits, size, exponent, seed):
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    back = there_and_back(x, bits)
    assert torch.equal(back, reference.quantize_and_back(x, bits, size=32))
    scales = quantize(x, bits)[1].double().repeat_interleave(32, dim=1)[:, :size]
    assert ((back - x).abs() <= scales / 2 * (1 + 1e-9) + 4e-6).all()


@given(bits=bits, size=sizes, tokens=st.integers(1, 5))
def test_bytes_are_those_of_codes_and_scales(bits, size, tokens):
    codes, scales = quantize(torch.randn(2, tokens, size), bits)
    assert codes.nbytes + scales.nbytes == 2 * tokens * vector_bytes(size, bits)


@pytest.mark.parametrize(
    ("size", "int8", "int4"),
    [
        (16, 18, 10),
        (32, 34, 18),
        (37, 41, 23),
        (40, 44, 24),
        (64, 68, 36),
        (128, 136, 72),
        (131, 141, 76),
        (144, 154, 82),
    ],
)
def test_bytes_of_usual_sizes_and_of_primes(size, int8, int4):
    assert (vector_bytes(size, 8), vector_bytes(size, 4)) == (int8, int4)


@given(size=st.integers(16, 3000))
def test_scales_cost_an_eighth_of_a_byte_a_number_at_most(size):
    assert vector_bytes(size, 8) <= size * (1 + 2 / 16)
    assert vector_bytes(size, 4) <= math.ceil(size / 2) + size * 2 / 16


@pytest.mark.parametrize("bits", BITS.values())
def test_a_rotary_key_behind_a_latent_has_a_scale_of_its_own(bits):
    latent, key = torch.randn(3, 128), 1000 * torch.randn(3, 16)
    together = there_and_back(torch.cat([latent, key], dim=1), bits)
    assert torch.equal(together, torch.cat([there_and_back(latent, bits), there_and_back(key, bits)], dim=1))


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7, 1.0, 1e5, 1e30])
def test_extreme_numbers_stay_finite_and_zeros_zero(bits, dtype, value):
    x = torch.zeros(2, 64, dtype=dtype)
    x[0, 3], x[1, 40] = value, -value
    back = there_and_back(x, bits)
    assert back.dtype == dtype
    assert back.isfinite().all()
    assert back[x == 0].eq(0).all()
    if 1e-6 < value < 1e6:
        torch.testing.assert_close(back, x, rtol=1e-2, atol=0)


@pytest.mark.parametrize("bits", BITS.values())
def test_a_number_depends_on_its_own_vector_alone(bits):
    x = torch.randn(2, 7, 48)
    assert torch.equal(there_and_back(x[1:, 3:5], bits), there_and_back(x, bits)[1:, 3:5])


@pytest.mark.parametrize("bits", BITS.values())
def test_a_long_cache_is_read_in_blocks(bits, monkeypatch):
    x = torch.randn(2, 3, 50, 40)
    whole = there_and_back(x, bits)
    monkeypatch.setattr("newllm.ops.quantize.BLOCK", 2 * 3 * 40 * 7)
    assert torch.equal(there_and_back(x, bits), whole)
