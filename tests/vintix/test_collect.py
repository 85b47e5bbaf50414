import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm.errors import UserError
from newllm.vintix import collect as module
from newllm.vintix.collect import collect, episode_returns, noise
from newllm.vintix.data import METADATA, History, read_histories
from newllm.vintix.environments import from_spec
from newllm.vintix.settings import CollectSettings


def settings(**values):
    few = {"train_tasks": 6, "validation_tasks": 2, "test_tasks": 3, "history_steps": 240, "score_episodes": 4}
    return CollectSettings(**(few | values))


def silent(text):
    pass


@given(
    steps=st.integers(10, 5000),
    power=st.floats(0.3, 6),
    free=st.floats(0, 1),
    shares=st.lists(st.floats(0, 1), min_size=2),
)
def test_the_noise_falls_from_one_to_nothing_in_the_last_share(steps, power, free, shares):
    chosen = settings(history_steps=steps, noise_power=power, noise_free_share=free)
    at = np.sort((np.array(shares) * steps).astype(int))
    epsilon = noise(at, chosen)
    assert ((epsilon >= 0) & (epsilon <= 1)).all()
    assert (np.diff(epsilon) <= 1e-12).all()
    assert (epsilon[at >= (1 - free) * steps] == 0).all()
    if free < 1:
        assert noise(0, chosen) == 1


def test_a_higher_power_keeps_the_noise_for_longer():
    step = np.arange(1, 200)
    low, high = (noise(step, settings(noise_power=power, noise_free_share=0.1)) for power in (1, 3))
    assert (low < high).all()
    assert np.isclose(noise(54, settings(noise_power=2, noise_free_share=0.1)), np.sqrt(1 - 0.25**2))


def test_without_noise_the_demonstrator_plays():
    assert (noise(np.arange(240), settings(noise_free_share=1.0)) == 0).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return collect(settings(histories_per_task=2, group_steps=100), tmp_path_factory.mktemp("vintix") / "data", silent)


def test_what_is_collected_is_read_back(folder):
    data = read_histories(folder)
    assert data.name == "point_reacher"
    assert data.observation.shape == (12, 240, 4)
    assert data.action.shape == (12, 240, 2)
    assert np.allclose(data.observation.mean(axis=(0, 1)), 0, atol=1e-4)
    assert np.allclose(data.observation.std(axis=(0, 1)), 1, atol=1e-4)
    assert np.isclose(data.reward.std(), 1, atol=1e-4)
    length = data.metadata["episode_length"]
    assert np.array_equal(data.step_num[0], np.arange(240) % length)
    family = from_spec(data.metadata["family"])
    assert [entry["task"] for entry in data.metadata["histories"]] == np.repeat(family.task_ids("train"), 2).tolist()
    assert sorted(path.name for path in folder.iterdir()) == ["histories", METADATA]


def test_random_and_demonstrator_returns_stand_in_the_metadata(folder):
    tasks = read_histories(folder).metadata["tasks"]
    assert {split: len(entries) for split, entries in tasks.items()} == {"train": 6, "validation": 2, "test": 3}
    for entry in (entry for entries in tasks.values() for entry in entries):
        assert set(entry["parameters"]) == {"goal_x", "goal_y"}
        assert entry["demonstrator"] > entry["random"] + 1


def test_histories_of_one_task_differ(folder):
    data = read_histories(folder)
    assert not np.allclose(data.action[0], data.action[1])


@pytest.mark.parametrize("name", ["point_reacher", "reacher", "pendulum"])
def test_histories_improve_from_random_play_to_the_demonstrators(tmp_path, name):
    few = settings(environment=name, train_tasks=16, test_tasks=1, validation_tasks=1, history_steps=1000)
    data = read_histories(collect(few, tmp_path / "data", silent))
    scores = data.metadata["history_scores"]
    assert scores[0] < 0.4
    assert scores[-1] > 0.8


def test_the_same_settings_give_the_same_histories(folder, tmp_path):
    again = collect(settings(histories_per_task=2, group_steps=100), tmp_path / "data", silent)
    other = collect(settings(histories_per_task=2, collect_seed=1), tmp_path / "other", silent)
    assert (again / METADATA).read_text() == (folder / METADATA).read_text()
    assert np.array_equal(read_histories(again).action, read_histories(folder).action)
    assert not np.array_equal(read_histories(other).action, read_histories(folder).action)


def test_a_second_call_keeps_what_is_there(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = []
    collect(settings(histories_per_task=2, group_steps=100), folder, said.append)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "already" in said[0]


def test_histories_of_other_settings_are_not_overwritten(folder):
    with pytest.raises(UserError, match="holds histories of other settings"):
        collect(settings(), folder, silent)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        collect(settings(), tmp_path, silent)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_collection_leaves_no_dataset_and_is_begun_anew(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "describe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(settings(), tmp_path / "data", silent)
    assert not (tmp_path / "data").exists()
    assert len(read_histories(collect(settings(), tmp_path / "data", silent)).reward) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [("train_tasks", 0), ("history_steps", 0), ("noise_power", 0.0), ("noise_free_share", 1.5), ("group_steps", 0)],
)
def test_a_value_out_of_range_is_named(tmp_path, name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}"):
        collect(dataclasses.replace(settings(), **{name: value}), tmp_path / "data", silent)


def test_returns_are_those_of_complete_episodes():
    step_num = np.array([0, 1, 2, 0, 1, 0, 1, 2, 0], dtype=np.int32)
    rewards = np.arange(9, dtype=np.float32)
    history = History(np.zeros((9, 1)), np.zeros((9, 1)), rewards, step_num)
    returns, ends = episode_returns(history, 3)
    assert returns.tolist() == [3, 7, 18]
    assert ends.tolist() == [2, 4, 7]


def test_the_metadata_are_json_that_names_what_17_asks_for(folder):
    metadata = json.loads((folder / METADATA).read_text())
    asked = {"name", "observation_dim", "action_dim", "action_type", "observation_mean", "observation_std"}
    assert asked | {"reward_scale", "action_low", "action_high"} <= set(metadata)


@pytest.mark.parametrize("name", ["plain_pendulum", "inverted_pendulum"])
def test_plain_environments_can_be_collected_from(tmp_path, name):
    few = settings(environment=name, train_tasks=2, test_tasks=1, validation_tasks=1, score_episodes=1)
    data = read_histories(collect(few, tmp_path / "data", silent))
    assert data.step_num.max() < data.metadata["episode_length"]
    ends = np.diff(data.step_num) < 0
    assert (data.step_num[:, 1:][ends] == 0).all()
    if name == "inverted_pendulum":  # at first the pole falls soon
        assert ends.any(axis=1).all()
