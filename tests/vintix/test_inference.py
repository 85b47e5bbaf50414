"""The engine: its ring of keys and values against the model that reads everything again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vintix_stub import inputs, raw_steps, small_model

from newllm.errors import UserError
from newllm.vintix.collect import collect
from newllm.vintix.data import HistoryDataset, read_histories, read_history
from newllm.vintix.inference import VintixEngine
from newllm.vintix.model import GROUP_KEYS
from newllm.vintix.settings import CollectSettings
from newllm.vintix.train import stack


def play(engine, observation, reward, start, resets=()):
    """Actions (B, T, a) of the engine; before step t it forgets rows where (t, rows) is in resets."""
    actions = []
    for t in range(observation.shape[1]):
        for step, rows in resets:
            if step == t:
                engine.reset(rows)
        engine.act(observation[:, t].numpy(), reward[:, t].numpy(), start[:, t].numpy())
        actions.append(engine.action.clone())
    return torch.stack(actions, dim=1)


def recomputed(model, observation, actions, reward, start):
    """What the model says of each step, given the actions that were done."""
    with torch.no_grad():
        said = model(**inputs(model, observation, actions, reward, start)).actions
    spec = model.config.groups[0]
    return said.clamp(torch.tensor(spec["action_low"]), torch.tensor(spec["action_high"]))


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 40),
    context=st.integers(1, 48),
    starts=st.lists(st.integers(1, 39), max_size=4),
    carry=st.booleans(),
    positions=st.booleans(),
)
def test_ring_equals_recomputation_before_and_after_eviction(rows, length, context, starts, carry, positions):
    """After it, the model that reads everything lets each step see the last `context` steps in every layer."""
    model = small_model(context=context, carry_reward=carry, inner_ep_pos_enc=positions, max_episode_steps=16)
    observation, reward, start = raw_steps(rows, length, starts)
    actions = play(VintixEngine(model, rows), observation, reward, start)
    expected = recomputed(model, observation, actions, reward, start)
    assert torch.allclose(actions, expected, rtol=0, atol=1e-10)


@given(length=st.integers(2, 30), reset=st.integers(1, 29), context=st.sampled_from([5, 64]), data=st.data())
def test_a_row_that_is_reset_acts_as_one_that_begins(length, reset, context, data):
    reset = min(reset, length - 1)
    rows = data.draw(st.sets(st.integers(0, 2), min_size=1))
    model = small_model(context=context)
    observation, reward, start = raw_steps(3, length, starts=(4, 11))
    engine = VintixEngine(model, 3)
    actions = play(engine, observation, reward, start, [(reset, sorted(rows))])
    kept = play(VintixEngine(model, 3), observation, reward, start)
    fresh = play(VintixEngine(model, 3), observation[:, reset:], reward[:, reset:], start[:, reset:])
    for row in range(3):
        expected = torch.cat([kept[row, :reset], fresh[row]]) if row in rows else kept[row]
        assert torch.allclose(actions[row], expected, rtol=0, atol=1e-10)
        since = length - reset if row in rows else length
        assert int(engine.lengths[row]) == min(since, context)


@pytest.mark.parametrize("environment", ["point_reacher", "pendulum"])
def test_the_engine_reads_a_history_as_training_does(tmp_path, environment):
    """What is collected, normalised, cut to a window and stacked, against the same steps as they come in play."""
    few = {"train_tasks": 3, "validation_tasks": 1, "test_tasks": 1, "score_episodes": 1, "history_steps": 120}
    folder = collect(CollectSettings(environment=environment, **few), tmp_path / "data", lambda line: None)
    histories = read_histories(folder)
    spec = {key: histories.metadata[key] for key in GROUP_KEYS}
    spec |= {"action_low": [-1e3] * len(spec["action_low"]), "action_high": [1e3] * len(spec["action_low"])}
    model = small_model(groups=[spec], context=120)
    window = stack([HistoryDataset([histories], 120, seed=0, start_share=1.0)[0]])
    window = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in window.items()
    }
    with torch.no_grad():
        expected = model(**window).actions[0]
    (row,) = (n for n, taken in enumerate(histories.action) if np.array_equal(taken, window["action"][0].numpy()))
    entry = histories.metadata["histories"][row]
    raw = read_history(
        folder / entry["file"], entry["steps"], histories.observation.shape[2], histories.action.shape[2]
    )
    engine = VintixEngine(model, 1)
    for step in range(120):
        reward = raw.reward[step - 1 : step] if step else np.zeros(1)
        engine.act(raw.observation[step : step + 1], reward, raw.step_num[step : step + 1] == 0)
        assert torch.allclose(engine.action[0], expected[step], rtol=0, atol=1e-3)
        engine.action = torch.from_numpy(raw.action[step : step + 1]).double()  # what was done there


def test_rows_to_reset_come_as_numbers_or_as_a_mask():
    observation, reward, start = raw_steps(3, 4, starts=())
    for rows in ([1], np.array([1]), [False, True, False], np.array([False, True, False])):
        engine = VintixEngine(small_model(), 3)
        play(engine, observation, reward, start, [(3, rows)])
        assert engine.lengths.tolist() == [4, 1, 4]
    for rows, lengths in (([], [4, 1, 4]), ([False] * 3, [4, 1, 4]), (None, [0, 0, 0])):
        engine.reset(rows)
        assert engine.lengths.tolist() == lengths


def test_a_row_that_is_reset_is_rid_of_numbers_that_are_not_finite():
    model = small_model(context=7)
    observation, reward, start = raw_steps(2, 12, starts=(5,))
    spoilt = observation.clone()
    spoilt[1, 2] = float("nan")
    actions, kept = (play(VintixEngine(model, 2), steps, reward, start, [(4, [1])]) for steps in (spoilt, observation))
    assert actions[1, 2:4].isnan().all()
    assert torch.equal(actions[1, 4:], kept[1, 4:])
    assert torch.equal(actions[0], kept[0])


def test_an_answer_that_is_changed_is_not_what_the_model_has_said():
    """In float32, where numbers need not be copied to be handed out."""
    model = small_model().float()
    observation, reward, start = raw_steps(2, 2, starts=())
    said = []
    for factor in (1, 7):
        engine = VintixEngine(model, 2)
        action = engine.act(observation[:, 0].numpy(), reward[:, 0].numpy(), start[:, 0].numpy())
        action *= factor
        said.append(engine.act(observation[:, 1].numpy(), reward[:, 1].numpy()))
    assert np.array_equal(*said)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"observation": np.zeros((3, 3))}, r"observation has the shape \(3, 3\), not \(2, 3\)"),
        ({"observation": np.zeros((1, 3))}, r"observation has the shape \(1, 3\), not \(2, 3\)"),
        ({"observation": np.zeros(3)}, r"observation has the shape \(3,\), not \(2, 3\)"),
        ({"previous_reward": 0.0}, r"previous_reward has the shape \(\), not \(2,\)"),
        ({"previous_reward": np.zeros((2, 1))}, r"previous_reward has the shape \(2, 1\), not \(2,\)"),
        ({"episode_start": [True]}, r"episode_start has the shape \(1,\), not \(2,\)"),
    ],
)
def test_what_has_another_shape_is_refused_and_not_read(given, message):
    model = small_model(inner_ep_pos_enc=True)
    right = {"observation": np.ones((2, 3)), "previous_reward": np.zeros(2), "episode_start": [0, 1]}  # numbers will do
    refused, engine = VintixEngine(model, 2), VintixEngine(model, 2)
    for each in (refused, engine):
        each.act(**right)
    with pytest.raises(UserError, match=message):
        refused.act(**right | given)
    assert np.array_equal(refused.act(**right), engine.act(**right))


def test_rows_do_not_see_each_other():
    model = small_model(context=7)
    observation, reward, start = raw_steps(3, 20, starts=(5,))
    together = play(VintixEngine(model, 3), observation, reward, start)
    order = [2, 0]
    apart = play(VintixEngine(model, 2), observation[order], reward[order], start[order])
    assert torch.allclose(together[order], apart, rtol=0, atol=1e-12)


def test_actions_are_clipped_and_the_reward_before_anything_is_of_no_matter():
    model = small_model(context=7)
    observation, reward, start = raw_steps(2, 10, starts=(5,))
    engine = VintixEngine(model, 2)
    first = engine.act(observation[:, 0].numpy(), np.array([1.0, 2.0]))
    assert first.dtype == np.float32
    again = VintixEngine(model, 2).act(observation[:, 0].numpy(), np.array([-5.0, 8.0]))
    assert np.array_equal(first, again)
    loud = small_model(context=7)
    with torch.no_grad():
        loud.heads[0][-1].weight *= 100
    actions = play(VintixEngine(loud, 2), observation, reward, start)
    assert actions.abs().max() == 1.0


def test_the_ring_is_allocated_once_and_nothing_moves():
    model = small_model(context=6)
    engine = VintixEngine(model, 2)
    address, size = engine.ring.keys.data_ptr(), engine.ring.nbytes()
    observation, reward, start = raw_steps(2, 20, starts=())
    play(engine, observation, reward, start)
    assert (engine.ring.keys.data_ptr(), engine.ring.nbytes()) == (address, size)
    assert size == 2 * 2 * 2 * 4 * 6 * 8 * 8  # keys and values, layers, rows, heads, slots, d, bytes


def test_a_saved_model_acts_as_before(tmp_path):
    model = small_model(context=9)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    observation, reward, start = raw_steps(2, 20, starts=(5,))
    before, after = (play(VintixEngine(m, 2), observation, reward, start) for m in (model, loaded))
    assert torch.allclose(before, after, rtol=0, atol=1e-12)


def test_a_context_without_the_present_step_is_refused():
    with pytest.raises(UserError, match="context"):
        VintixEngine(small_model(), 1, context=0)
