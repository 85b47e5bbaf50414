"""The packed form of Linear: the same numbers, and never a stale weight."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from newllm.models import create_model
from newllm.models.linear import Linear
from newllm.ops.linear import FEW_ROWS, worth_packing

BF16_ULP = 2**-8


def uses_packed(linear, x):
    linear(x)
    return linear._packed is not None


@given(
    rows=st.integers(1, FEW_ROWS),
    size_in=st.sampled_from([257, 512, 1000]),
    size_out=st.sampled_from([300, 2048, 5003]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_packed_equals_plain(rows, size_in, size_out, dtype, bias):
    torch.manual_seed(0)
    linear = Linear(size_in, size_out, bias=bias).to(dtype)
    x = torch.randn(1, rows, size_in).to(dtype)
    with torch.no_grad():
        expected = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
        assert uses_packed(linear, x)
        tolerance = 1e-5 if dtype == torch.float32 else BF16_ULP
        torch.testing.assert_close(linear(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_only_few_rows_without_gradient_are_packed():
    linear, row = Linear(512, 512), torch.randn(1, 512)
    assert not uses_packed(linear, row)  # gradients are wanted
    with torch.no_grad():
        assert not uses_packed(linear, torch.randn(FEW_ROWS + 1, 512))
        assert not uses_packed(Linear(64, 64), torch.randn(1, 64))  # small
        assert not uses_packed(Linear(512, 512).double(), row.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not uses_packed(linear, row)
        assert uses_packed(linear, row)
        assert not uses_packed(linear.train(), torch.randn(FEW_ROWS + 1, 512))  # train() has dropped the copy


@pytest.mark.parametrize("change", ["in place", "load", "optimizer", "to", "data and train"])
def test_a_changed_weight_is_seen(change):
    linear, x = Linear(512, 300), torch.randn(2, 512)
    with torch.no_grad():
        before = linear(x)
    if change == "in place":
        nn.init.normal_(linear.weight)
    elif change == "load":
        linear.load_state_dict(Linear(512, 300).state_dict())
    elif change == "optimizer":
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)
        linear(x).sum().backward()
        optimizer.step()
    elif change == "to":
        linear, x = linear.bfloat16(), x.bfloat16()
    else:
        linear.weight.data.mul_(3)
        linear.eval()
    with torch.no_grad():
        after = linear(x)
        expected = F.linear(x, linear.weight, linear.bias)
    assert worth_packing(x, linear.weight) is False  # outside of no_grad
    torch.testing.assert_close(after, expected, rtol=1e-2 if change == "to" else 1e-4, atol=1e-2)
    if change != "to":
        assert (after - before).abs().max() > 0.05


def test_copies_pickles_and_saved_files_go_without_the_packed_weight(tmp_path):
    shape = {"hidden_size": 256, "num_layers": 1, "num_heads": 4, "intermediate_size": 512, "vocab_size": 1000}
    model, ids = create_model("pythia", **shape).eval(), torch.randint(1000, (1, 4))
    with torch.no_grad():
        logits = model(ids).logits
        assert model.head._packed is not None
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.head._packed is None
            assert torch.equal(twin(ids).logits, logits)
    model.save_pretrained(tmp_path)
    assert not [name for name in model.state_dict() if "packed" in name]


def test_inference_mode_and_gradients_after_decoding():
    linear, x = Linear(512, 512), torch.randn(1, 512)
    with torch.inference_mode():
        inside = linear(x)
        assert linear._packed is not None
        made_inside = Linear(512, 512)  # its changes are not counted: never packed
        assert not uses_packed(made_inside, x)
        made_inside.load_state_dict(linear.state_dict())
        torch.testing.assert_close(made_inside(x), inside, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inside.clone(), linear(x).detach(), rtol=1e-5, atol=1e-5)
    linear(x).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_sampling_between_training_steps_sees_every_step(fused, training):
    """The loss multiplies with head.weight outside of head's forward, and fused optimizers do not raise versions."""
    shape = {"hidden_size": 256, "num_layers": 1, "num_heads": 4, "intermediate_size": 512, "vocab_size": 1000}
    model = create_model("mla", **shape).train(training)
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused), torch.randint(1000, (2, 40))
    for _ in range(3):
        with torch.no_grad():
            few = model(ids[:, :5]).logits
            assert model.head._packed is not None
            many = model(ids).logits[:, :5]
        torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-3)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_other_weights_at_the_same_address_are_told_apart():
    linear, x = Linear(512, 512), torch.randn(1, 512)
    with torch.no_grad():
        for _ in range(8):
            weight = torch.randn(512, 512)
            out = torch.func.functional_call(linear, {"weight": weight}, x)
            torch.testing.assert_close(out, F.linear(x, weight, linear.bias), rtol=1e-3, atol=1e-3)
            del weight, out
        for _ in range(4):
            linear.weight.data = torch.randn(512, 512)
            torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias), rtol=1e-3, atol=1e-3)
