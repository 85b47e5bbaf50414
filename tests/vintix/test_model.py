"""The Vintix model: its size, causality, rows, pads, and one folder that holds all of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vintix_stub import group, inputs, raw_steps, small_model

from newllm.errors import UserError
from newllm.vintix.model import VintixConfig, VintixModel


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def trunk_size(D, L, H, F):
    return L * (4 * D**2 + 2 * D * F + 9 * D + F + 4 * D // H) + 2 * D


def group_size(D, o, a):
    w = D // 2 - 1
    return (w * w + (o + 6) * w) + (w * w + (a + 6) * w) + 4 + 3 * (D * D + D) + (D + 1) * a


def test_small_has_the_parameters_of_the_specification():
    config = VintixConfig(groups=[group(4, 2)], hidden_size=256, num_layers=3, num_heads=4, intermediate_size=128)
    model = VintixModel(config)
    assert count(model) == 1_224_183
    assert count(model.blocks) + count(model.norm) == trunk_size(256, 3, 4, 128) == 991_616
    assert count(model.encoders) + count(model.heads) == group_size(256, 4, 2) == 232_438


def test_the_papers_trunk_builds_on_the_meta_device_and_adds_up_with_its_groups():
    actions = [*(8, 6, 3, 17, 17, 1, 1, 7, 2, 2, 6), *(4, 3), *(40, *[52] * 7)]  # MuJoCo, two of one robot, hands
    sizes = list(zip([205] * 20 + [4323 - 20 * 205], actions, strict=True))  # of observations only the sum is known
    config = VintixConfig(
        groups=[group(*size) for size in sizes],
        **{"hidden_size": 1024, "num_layers": 20, "num_heads": 16, "intermediate_size": 4096},
    )
    with torch.device("meta"):
        model = VintixModel(config)
    assert len(sizes) == 21
    assert count(model.blocks) + count(model.norm) == trunk_size(1024, 20, 16, 4096) == 251_931_648
    assert count(model) == 251_931_648 + 513 + sum(group_size(1024, *size) for size in sizes) == 332_100_768


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3),
    heads=st.sampled_from([1, 2, 4]),
    layers=st.integers(1, 3),
    mlp=st.integers(1, 50),
)
def test_closed_form_of_the_parameters(groups, heads, layers, mlp):
    D = 16
    config = VintixConfig(
        groups=[group(*size) for size in groups],
        **{"hidden_size": D, "num_layers": layers, "num_heads": heads, "intermediate_size": mlp},
    )
    with torch.device("meta"):
        total = count(VintixModel(config))
    assert total == trunk_size(D, layers, heads, mlp) + D // 2 + 1 + sum(group_size(D, *size) for size in groups)


@given(length=st.integers(2, 40), data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_no_future_bit_for_bit(length, data, dtype):
    model = small_model(context=16).to(dtype)
    changed = data.draw(st.integers(1, length - 1))
    observation, reward, start = raw_steps(2, length, starts=(7, 20))
    batch = inputs(model, observation, torch.randn(2, length, 2, dtype=torch.float64), reward, start)
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad():  # both: what a gradient is wanted of may be computed by another kernel
        before = model(**batch).actions[:, :changed]
        for name in ("observation", "previous_action", "previous_reward"):
            batch[name][:, changed:] += 1
        batch["episode_start"][:, changed:] ^= True
        assert torch.equal(model(**batch).actions[:, :changed], before)


def test_rows_do_not_see_each_other():
    model = small_model()
    observation, reward, start = raw_steps(3, 20, starts=(8,))
    batch = inputs(model, observation, torch.randn(3, 20, 2, dtype=torch.float64), reward, start)
    alone = model(**{name: x[1:2] for name, x in batch.items()}).actions
    assert torch.allclose(model(**batch).actions[1:2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("carry_reward", [True, False])
def test_pads_stand_for_what_is_not_there(carry_reward):
    """At an episode's start the action is a pad; the reward is one at the history's start, or at every episode's."""
    model = small_model(carry_reward=carry_reward)
    observation, reward, start = raw_steps(1, 12, starts=(6,))
    actions = torch.randn(1, 12, 2, dtype=torch.float64)
    expected = model(**inputs(model, observation, actions, reward, start)).actions
    actions[:, 5] += 1  # what was done before the second episode
    reward[:, 0] += 1  # what came before the history
    assert torch.equal(model(**inputs(model, observation, actions, reward, start)).actions, expected)
    reward[:, 6] += 1
    changed = model(**inputs(model, observation, actions, reward, start)).actions
    assert torch.equal(changed, expected) is not carry_reward


def test_what_is_observed_and_paid_is_not_rounded_to_bf16():
    model = small_model().float()
    observation, reward, start = raw_steps(2, 8, starts=(4,))
    batch = inputs(model, observation, torch.randn(2, 8, 2, dtype=torch.float64), reward, start)
    batch = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    expected = model.embed(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed(**batch), expected)
        assert torch.isfinite(model(**batch).actions).all()


def test_step_in_episode_is_clamped_to_its_table():
    model = small_model(inner_ep_pos_enc=True, max_episode_steps=4)
    observation, reward, start = raw_steps(1, 8, starts=())
    batch = inputs(model, observation, torch.zeros(1, 8, 2, dtype=torch.float64), reward, start)
    expected = model(**batch).actions
    batch["step_in_episode"][:, 4:] = 3
    assert torch.equal(model(**batch).actions, expected)
    batch["step_in_episode"][:, 2] = 3
    assert not torch.equal(model(**batch).actions, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_of_training_alone_and_the_loss_is_the_mean_square(dropout):
    model = small_model(dropout=dropout, context=6)
    observation, reward, start = raw_steps(2, 20, starts=(9,))
    done = torch.randn(2, 20, 2, dtype=torch.float64)
    batch = inputs(model, observation, done, reward, start)
    output = model(**batch, action=done)
    assert torch.allclose(output.loss, ((output.actions - done) ** 2).mean())
    trained = model.train()(**batch).actions
    assert torch.allclose(trained, output.actions) is (dropout == 0)


@pytest.mark.parametrize("context", [5, 24])
def test_attention_with_dropout_is_otherwise_the_same(context):
    model = small_model(dropout=1e-12, context=context)  # so little that nothing is dropped
    observation, reward, start = raw_steps(2, 20, starts=(9,))
    batch = inputs(model, observation, torch.randn(2, 20, 2, dtype=torch.float64), reward, start)
    expected = model(**batch).actions
    assert torch.allclose(model.train()(**batch).actions, expected, rtol=0, atol=1e-9)


def test_one_folder_holds_weights_and_statistics(tmp_path):
    model = small_model(groups=[group(3, 2, "point"), group(5, 1, "pendulum")], inner_ep_pos_enc=True)
    model.save_pretrained(tmp_path)
    loaded = VintixModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.groups == model.config.groups
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    observation, reward, start = raw_steps(2, 9, starts=(4,))
    batch = inputs(model, observation, torch.zeros(2, 9, 2, dtype=torch.float64), reward, start)
    assert torch.allclose(model(**batch).actions, loaded(**batch).actions, rtol=0, atol=1e-12)


def test_last_only_is_the_last_of_all():
    model = small_model()
    observation, reward, start = raw_steps(2, 9, starts=(4,))
    batch = inputs(model, observation, torch.zeros(2, 9, 2, dtype=torch.float64), reward, start)
    assert torch.allclose(model(**batch, last_only=True).actions, model(**batch).actions[:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"contxt": 3}, {"hidden_size": 30}, {"hidden_size": 2, "num_heads": 1}])
def test_wrong_configurations_are_refused(options):
    with pytest.raises(UserError, match=r"context|hidden_size"):
        VintixConfig(**options)
