"""Metadata that somebody has edited by hand: refused in one line that names the file and the value, before any work."""

import json
import shutil

import pytest
from vintix_stub import SMALL, write_dataset

from newllm.errors import UserError
from newllm.vintix.data import DATA_FILE, METADATA, read_histories
from newllm.vintix.metadata import flaw, read_family
from newllm.vintix.runs import find_runs
from newllm.vintix.settings import VintixRun
from newllm.vintix.train import train

ABSENT = object()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("vintix") / "histories")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vintix") / "run"
    train(VintixRun(**SMALL), [data], folder)
    return folder


def edited(folder, where, value):
    """The metadata of a folder with the value at a place, such as 'tasks.test.0.random', replaced or left out."""
    metadata = json.loads((folder / METADATA).read_text())
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    inner = metadata
    for key in path:
        inner = inner[key]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return metadata


FLAWS = [
    ("reward_scale", ABSENT, "it lacks reward_scale"),
    ("reward_scale", "x", "reward_scale is 'x', not a finite number"),
    ("reward_scale", float("nan"), "reward_scale is nan, not a finite number"),
    ("reward_scale", 10**400, "not a finite number"),
    ("reward_scale", 0, "reward_scale is 0, not greater than 0"),
    ("observation_dim", "4", "observation_dim is '4', not a whole number of at least 1"),
    ("action_dim", True, "action_dim is True, not a whole number of at least 1"),
    ("observation_mean", [0.0, 0.0], "observation_mean is [0.0, 0.0], not a list of 4 numbers"),
    ("observation_std.1", 0, "not numbers greater than 0"),
    ("action_low.0", None, "action_low[0] is None, not a finite number"),
    ("name", "a/b", "name is 'a/b', not the name of a family of tasks"),
    ("family", 5, "family is 5, not an object with name, options, counts, task_seed"),
    ("family.name", "reacher", "family.name is 'reacher', not 'point_reacher', as name is"),
    ("family.extra", 1, "family has extra, which is unknown"),
    ("family.task_seed", -1, "family.task_seed is -1, not a whole number of at least 0"),
    ("family.counts.test", 2.5, "family.counts.test is 2.5, not a whole number of at least 1"),
    ("family.options.kind", ABSENT, "family.options lacks kind"),
    ("family.options.kind", "../x", "family.options.kind is '../x', not a kind of environment"),
    ("family.options.episode_length", 8.5, "family.options.episode_length is 8.5, not a whole number"),
    ("tasks.validation", ABSENT, "tasks lacks validation"),
    ("tasks.test.4", ABSENT, "not a list of 5 tasks, as family.counts says"),
    ("tasks.test.1.random", ABSENT, "tasks.test[1] lacks random"),
    ("tasks.test.1.demonstrator", "much", "tasks.test[1].demonstrator is 'much', not a finite number"),
    ("collect.history_steps", ABSENT, "collect lacks history_steps"),
    ("collect.history_steps", "many", "collect.history_steps is 'many', not a value of --history-steps"),
    ("collect.train_tasks", 0, "collect: --train-tasks is 0: it must be at least 1"),
    ("collect.more", 0, "collect has more, which is unknown"),
]
OF_HISTORIES = [
    ("histories", [], "histories is [], not a list of histories"),
    ("histories", ABSENT, "histories is None, not a list of histories"),
    ("histories.1.file", ABSENT, "histories[1] lacks file"),
    ("histories.1.file", 7, "histories[1].file is 7, not a file name"),
    ("histories.1.steps", "12", "histories[1].steps is '12', not a whole number of at least 1"),
    ("histories.1.task", 99, "histories[1].task is 99, not one of the 6 training tasks, from 0"),
    ("histories.1.steps", 12, "histories of different lengths, from 12 to 48 steps, where all must be equally long"),
]
OF_TASKS = [
    ("family.options.kind", "regions", "no environment can be made of family.options (AttributeError"),
    ("family.options.kind", "nothing", "no environment can be made of family.options (ModuleNotFoundError"),
    ("family.options.sectors", 10**15, "no environment can be made of family.options ("),
    ("family.options.held_out_every", 0, "no environment can be made of family.options (FloatingPointError"),
    ("family.options.damping", "x", "no environment can be made of family.options ("),
    ("family.options.gain", ABSENT, "no environment can be made of family.options (KeyError: 'gain'"),
    ("family.options.acceleration", -1, "no environment can be made of family.options (FloatingPointError"),
    ("family.options.margin", 0.1, "the tasks are not those that family.options and task_seed give"),
    ("family.task_seed", 5, "the tasks are not those that family.options and task_seed give"),
    ("tasks.train.0.parameters.goal_x", 0.5, "the tasks are not those that family.options and task_seed give"),
    ("action_high.1", 5.0, "observations and actions are not those of the family point_reacher"),
]


@pytest.mark.parametrize(("where", "value", "message"), [*FLAWS, *OF_HISTORIES])
def test_reading_names_what_is_wrong(data, tmp_path, where, value, message):
    (tmp_path / METADATA).write_text(json.dumps(edited(data, where, value)))
    with pytest.raises(UserError) as refused:
        read_histories(tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / METADATA}: broken: ")
    assert message in line
    assert line.endswith("; collect the histories again into a new folder")


@pytest.mark.parametrize(("where", "value", "message"), OF_TASKS)
def test_tasks_that_cannot_be_or_are_others_are_refused(data, where, value, message):
    metadata = edited(data, where, value)
    assert flaw(metadata, histories=True) is None
    with pytest.raises(UserError) as refused:
        read_family(metadata, "metadata.json", "look elsewhere")
    assert str(refused.value).startswith("metadata.json: broken: ")
    assert message in str(refused.value)
    assert str(refused.value).endswith("; look elsewhere")
    assert "\n" not in str(refused.value)


def test_training_refuses_them_before_it_touches_its_folder(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "histories")
    (folder / METADATA).write_text(json.dumps(edited(data, "family.options.gain", ABSENT)))
    for target in ("taken", "demonstrator"):
        with pytest.raises(UserError, match=rf"{METADATA}: broken: no environment can be made of family.options"):
            train(VintixRun(**SMALL, target=target), [folder], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("where", "value", "message"), FLAWS)
def test_what_a_run_knows_of_its_histories_is_checked_as_well(data, trained, tmp_path, where, value, message):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / DATA_FILE).write_text(json.dumps([edited(data, where, value)]))
    with pytest.raises(UserError) as refused:
        find_runs([folder], print)
    assert f"run is damaged ({DATA_FILE}: " in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.yaml", lambda text: text.replace("\nseed: 0", "\nseed: first"), "config.yaml: seed is 'first'"),
        ("config.yaml", lambda text: text.replace("lr: 0.0003", "lr: [1]"), r"config.yaml: lr is \[1\]"),
        ("config.yaml", lambda text: text.replace("target: taken", "target: 5"), "config.yaml: target is 5"),
        ("metrics.jsonl", lambda text: text + "5\n", "metrics.jsonl has lines that are no objects"),
        ("metrics.jsonl", lambda text: "[" * 100_000, "RecursionError"),
        ("result.json", lambda text: text.replace('"training": {', '"training": 5, "more": {'), "result.json does not"),
        (DATA_FILE, lambda text: "[]", f"{DATA_FILE} is no list of objects"),
    ],
)
def test_other_files_of_a_run_edited_by_hand(trained, tmp_path, file, change, message):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = (folder / file).read_text()
    (folder / file).write_text(change(before))
    assert (folder / file).read_text() != before
    with pytest.raises(UserError, match=rf"run is damaged \({message}"):
        find_runs([folder], print)
