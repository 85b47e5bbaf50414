import contextlib
import json

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vintix_stub import write_dataset

from newllm.errors import UserError
from newllm.vintix.data import KEYS, METADATA, Histories, History, HistoryDataset, read_histories, read_history
from newllm.vintix.data import write_history as write


def history(steps, seed=0):
    chance = np.random.default_rng(seed)
    return History(
        chance.normal(size=(steps, 3)).astype(np.float32),
        chance.normal(size=(steps, 2)).astype(np.float32),
        chance.normal(size=steps).astype(np.float32),
        (np.arange(steps) % 5).astype(np.int32),
    )


def histories(count=3, steps=40, name="family", scale=1.0):
    """Column values say where they come from: 100·history + step."""
    values = (100 * np.arange(count)[:, None] + np.arange(steps)).astype(np.float32) * scale
    step_num = np.tile(np.arange(steps, dtype=np.int32) % 5, (count, 1))
    return Histories({"name": name}, values[..., None], values[..., None], values, step_num)


@given(steps=st.integers(1, 60), group_steps=st.integers(1, 70))
def test_a_history_is_read_back_as_written(tmp_path_factory, steps, group_steps):
    path = tmp_path_factory.mktemp("data") / "00000.h5"
    write(path, history(steps), group_steps)
    back = read_history(path, steps, 3, 2)
    for name in ("observation", "action", "reward", "step_num"):
        written = getattr(history(steps), name)
        assert np.array_equal(getattr(back, name), written)
        assert getattr(back, name).dtype == written.dtype


def test_groups_are_named_by_their_first_and_last_step(tmp_path):
    write(tmp_path / "a.h5", history(25), 10)
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file) == {"0-9", "10-19", "20-24"}
        assert all(set(group) == set(KEYS) for group in file.values())


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_empty(path):
    path.write_bytes(b"")


def damage_no_hdf5(path):
    path.write_text("not what it was")


def damage_missing(path):
    path.unlink()


def damage_first_group(path):
    with h5py.File(path, "a") as file:
        del file["0-9"]


def damage_middle_group(path):
    with h5py.File(path, "a") as file:
        del file["10-19"]


def damage_last_group(path):
    with h5py.File(path, "a") as file:
        del file["20-24"]


def damage_all_groups(path):
    with h5py.File(path, "w"):
        pass


def damage_key(path):
    with h5py.File(path, "a") as file:
        del file["10-19"]["reward"]


def damage_other_group(path):
    with h5py.File(path, "a") as file:
        file.create_group("notes")


def damage_shape(path):
    with h5py.File(path, "a") as file:
        del file["0-9"]["action"]
        file["0-9"]["action"] = np.zeros((9, 2), dtype=np.float32)


def damage_width(path):
    with h5py.File(path, "a") as file:
        del file["0-9"]["action"]
        file["0-9"]["action"] = np.zeros((10, 3), dtype=np.float32)


def damage_key_is_group(path):
    with h5py.File(path, "a") as file:
        del file["10-19"]["reward"]
        file["10-19"].create_group("reward")


def damage_kind(path):
    with h5py.File(path, "a") as file:
        for name in file:
            steps = len(file[name]["reward"])
            del file[name]["reward"]
            file[name]["reward"] = np.full(steps, b"1.0")


def damage_numbers(path):
    with h5py.File(path, "a") as file:
        file["0-9"]["reward"][3] = np.nan


def damage_steps(path):
    with h5py.File(path, "a") as file:
        file["0-9"]["step_num"][3] = -1


def damage_first_step(path):
    with h5py.File(path, "a") as file:
        file["0-9"]["step_num"][:5] = np.arange(1, 6)


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_or_incomplete_file_is_refused_with_its_name(tmp_path, damage):
    path = tmp_path / "00007.h5"
    write(path, history(25), 10)
    damage(path)
    with pytest.raises(UserError, match=r"00007\.h5"):
        read_history(path, 25, 3, 2)


@given(where=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(tmp_path_factory, where, bit):
    path = tmp_path_factory.mktemp("data") / "00000.h5"
    write(path, history(25), 10)
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        back = read_history(path, 25, 3, 2)
        for name in ("observation", "action", "reward", "step_num"):
            assert np.array_equal(getattr(back, name), getattr(history(25), name))


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000, '{"format": 0}', '{"format": 1}'])
def test_a_folder_without_sound_metadata_is_refused_with_its_name(tmp_path, content):
    if content is not None:
        (tmp_path / METADATA).write_text(content)
    with pytest.raises(UserError, match=tmp_path.name):
        read_histories(tmp_path)


def test_histories_are_normalised_by_what_the_metadata_say(tmp_path):
    folder = write_dataset(tmp_path / "histories")
    metadata = json.loads((folder / METADATA).read_text())
    read, raw = read_histories(folder), read_history(folder / "2.h5", 48, 4, 2)
    mean, std = (np.array(metadata[key]) for key in ("observation_mean", "observation_std"))
    assert np.allclose(read.observation[2] * std + mean, raw.observation, atol=1e-6)
    assert np.allclose(read.reward[2], metadata["reward_scale"] * raw.reward)
    assert np.array_equal(read.action[2], raw.action)


@given(
    index=st.integers(0, 99), context=st.integers(1, 40), seed=st.integers(0, 5), start_share=st.sampled_from([0, 1])
)
def test_a_window_is_a_run_of_one_history_with_what_came_before(index, context, seed, start_share):
    item = HistoryDataset([histories()], context, seed, length=100, start_share=start_share)[index]
    values = item["observation"][:, 0]
    assert np.array_equal(np.diff(values), np.ones(context - 1))
    assert values[0] // 100 == values[-1] // 100
    before = np.where(values % 100 == 0, 0, values - 1)
    assert np.array_equal(item["previous_action"][:, 0], before)
    assert np.array_equal(item["previous_reward"][:, 0], before)
    assert np.array_equal(item["action"], item["observation"])
    assert np.array_equal(item["step_in_episode"], values % 100 % 5)
    assert np.array_equal(item["episode_start"], item["step_in_episode"] == 0)
    assert np.array_equal(item["history_start"], values % 100 == 0)
    if start_share == 1:
        assert values[0] % 100 == 0
    shapes = {"observation": (context, 1), "action": (context, 1), "previous_reward": (context, 1)}
    assert {name: item[name].shape for name in shapes} == shapes


def test_an_item_depends_on_seed_and_index_alone():
    one, same, other = (HistoryDataset([histories()], 8, seed, length=50) for seed in (1, 1, 2))
    _ = [same[index] for index in range(50)]
    first = [one[index]["observation"][0, 0] for index in range(50)]
    assert first == [same[index]["observation"][0, 0] for index in reversed(range(50))][::-1]
    assert first != [other[index]["observation"][0, 0] for index in range(50)]


def test_all_of_the_histories_are_used():
    data = HistoryDataset([histories(steps=12)], 8, 0, length=300)
    starts = {float(data[index]["observation"][0, 0]) for index in range(300)}
    assert starts == {100.0 * history + step for history in range(3) for step in range(5)}


def test_a_block_is_of_one_group_and_groups_come_by_their_steps():
    data = HistoryDataset([histories(1), histories(3, name="other", scale=-1)], 8, 0, length=400, block=4)
    groups = np.array([data[index]["group"] for index in range(400)]).reshape(100, 4)
    assert (groups == groups[:, :1]).all()
    assert 0.6 < groups.mean() < 0.9
    assert all((data[index]["observation"] <= 0).all() == data.group(index) for index in range(8, 400))


def test_a_context_longer_than_the_histories_is_refused():
    with pytest.raises(UserError, match="--context is 41: the histories of family have 40 steps"):
        HistoryDataset([histories()], 41, 0)
