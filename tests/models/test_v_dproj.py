"""What V-DProj adds to Pythia's layer: widths, bytes, the restored values, and the loss of their first phase."""

import pytest
import torch

from newllm.errors import UserError
from newllm.evaluation import cache_bytes
from newllm.evaluation.checks import CHECK_SHAPE
from newllm.models import create_model
from newllm.models.layers import VDProjLayer


@pytest.mark.parametrize(
    ("model", "precision", "bytes_per_token"),
    [
        ("pythia", "model", 12_288),
        ("v_dproj", "model", 9_984),
        ("v_dproj:value_dim=256", "model", 9_216),
        ("v_dproj:value_dim=0.75", "model", 10_752),
        ("kv_dproj", "model", 7_680),
        ("v_dproj_restore", "model", 12_288),
        ("v_dproj", "int8", 5_376),
        ("kv_dproj", "int8", 4_224),
        ("v_dproj", "int4", 2_880),
        ("kv_dproj", "int4", 2_304),
    ],
)
def test_measured_bytes_per_token_at_the_70m_shape(model, precision, bytes_per_token):
    lm = create_model(model, vocab_size=50, intermediate_size=64, cache_precision=precision).bfloat16().eval()
    cache, used = lm.make_cache(), []
    with torch.no_grad():
        for _ in range(2):
            lm(torch.randint(50, (1, 3)), past_key_values=cache)
            used.append(cache_bytes(cache).used)
    assert used == [3 * bytes_per_token, 6 * bytes_per_token]


def test_widths_are_numbers_or_shares_and_stand_as_numbers_in_the_spec():
    layer = VDProjLayer(512, 8, 64, value_dim=0.625, key_dim=0.5)
    assert (layer.spec["key_dim"], layer.spec["value_dim"]) == (256, 320)
    assert layer.spec == VDProjLayer(512, 8, 64, value_dim=320, key_dim=256).spec
    assert layer.out.in_features == 320
    assert layer.qkv.out_features == 2 * 256 + 320
    assert VDProjLayer(512, 8, 64).spec["key_dim"] == 512


def test_as_wide_as_pythia_it_is_pythia():
    torch.manual_seed(1)
    theirs = create_model("pythia", **CHECK_SHAPE).eval()
    ours = create_model("v_dproj", value_dim=1.0, **CHECK_SHAPE).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_dim": 321}, "value_dim is 321: it must be a multiple of num_heads 8, for example 320"),
        ({"key_dim": 1.5}, "key_dim is 1.5: it must be a multiple of num_heads 8"),
        ({"value_dim": 0}, "value_dim is 0"),
        ({"value_dim": True}, "value_dim is True"),
        ({"key_dim": 8}, "key_dim 8 leaves a head 1 number: rotary positions turn pairs"),
        ({"restore": "two_phases"}, "did you mean 'two_phase'"),
    ],
)
def test_a_width_that_no_head_size_gives_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        VDProjLayer(512, 8, 64, **options)


def test_restored_values_start_with_the_variance_of_the_values():
    torch.manual_seed(0)
    layer = create_model("v_dproj_restore", hidden_size=256, num_heads=4, num_layers=1, vocab_size=50).layers[0]
    x = torch.randn(2, 50, 256)
    with torch.no_grad():
        _, restored = layer._project(x)
        _, v = super(VDProjLayer, layer)._project(x)
    assert restored.shape == v.shape
    assert 0.8 < float(restored.std() / v.std()) < 1.25


def test_only_the_two_phase_variant_has_a_first_phase():
    for model in ("pythia", "v_dproj", "kv_dproj", "v_dproj_restore"):
        assert create_model(model, **CHECK_SHAPE).reconstruction() is None
    model = create_model("v_dproj_restore_two_phase", **CHECK_SHAPE)
    first = model.reconstruction()
    names = {name for name, p in model.named_parameters() if any(p is trained for trained in first.trained)}
    parts = ("compress.weight", "compress.bias", "expand.weight", "expand.bias")
    assert names == {f"layers.{n}.{part}" for n in range(2) for part in parts}


def test_the_first_phase_minimises_the_distance_of_values_and_restored_values():
    model = create_model("v_dproj_restore_two_phase", **CHECK_SHAPE).double()
    first, ids = model.reconstruction(), torch.randint(61, (2, 7))
    x, errors = model.embed(ids), []
    for layer in model.layers:
        normed = layer.norm_attention(x)
        v = (normed @ layer.qkv.weight.T + layer.qkv.bias)[..., 2 * 64 :]
        restored = layer.expand(layer.compress(v))
        errors.append(((v - restored) ** 2).sum(-1) / 64)
        x = layer(x, positions=torch.arange(7).expand(2, 7), mask=None, state=None)
    expected = (errors[0] + errors[1]) / 2
    torch.testing.assert_close(first(ids)["loss"], expected.mean())
    torch.testing.assert_close(first.token_losses(ids), expected[:, :-1])


@pytest.mark.parametrize("bf16", [False, True])
def test_a_layer_learns_from_its_own_loss_alone(bf16):
    """Layer 1's values depend on layer 0's bottleneck; its loss must not."""
    model = create_model("v_dproj_restore_two_phase", **CHECK_SHAPE)
    first, ids = model.reconstruction(), torch.randint(61, (2, 7))
    first.freeze_the_rest()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        first(ids)["loss"].backward()
    for name, parameter in model.named_parameters():
        trained = any(part in name for part in ("compress", "expand"))
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == trained, name
    together = model.layers[0].compress.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        (model.layers[0].reconstruction_loss(model.embed(ids)).mean() / 2).backward()
    assert torch.equal(model.layers[0].compress.weight.grad, together)


def test_the_second_phase_trains_everything_else():
    model = create_model("v_dproj_restore_two_phase", **CHECK_SHAPE)
    first, ids = model.reconstruction(), torch.randint(61, (2, 7))
    first.freeze_the_rest()
    model.freeze_first_phase()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, p in model.named_parameters() if any(p is trained for trained in first.trained)}
