"""Folders that are complete or not there, and who owns a run folder."""

import errno
import os
from dataclasses import dataclass

import pytest

from newllm.errors import UserError
from newllm.resolution import resolve
from newllm.settings import RunSettings
from newllm.training.checkpoints import (
    checkpoints,
    claim_run_folder,
    complete_checkpoint,
    complete_folder,
    newest_checkpoint,
    read_result,
    remove_except,
    remove_incomplete,
    training_result,
    write_result,
    write_whole,
)


@dataclass
class Result:
    steps: int
    score: float


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    with complete_folder(tmp_path / "checkpoint-3") as staging:
        (staging / "part").write_text("whole")
        assert checkpoints(tmp_path) == []
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "part").read_text() == "whole"


def test_the_rest_of_a_killed_write_is_no_checkpoint_and_is_removed(tmp_path):
    (tmp_path / "checkpoint-7.incomplete").mkdir()
    (tmp_path / "result.json.incomplete").write_text("{")
    (tmp_path / "checkpoint-2").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_that_does_not_say_how_large_its_files_are_is_damaged(tmp_path):
    with complete_checkpoint(tmp_path / "checkpoint-3") as staging:
        (staging / "part").write_text("whole")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-3" / "sizes.json").unlink()
    with pytest.raises(UserError, match=r"sizes.json is damaged, and no older checkpoint is whole"):
        newest_checkpoint(tmp_path)


def test_checkpoints_are_ordered_by_step_and_pruned(tmp_path):
    for step in (100, 20, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    remove_except(tmp_path, {20})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("No space left")])
def test_a_full_disk_is_one_line_and_leaves_what_was_complete(tmp_path, error):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match="no space left") as caught, complete_folder(tmp_path / "checkpoint-2"):
        raise error
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), complete_folder(tmp_path / "checkpoint-2"):
        raise RuntimeError("a bug")
    assert list(tmp_path.iterdir()) == []


def test_a_text_file_is_replaced_whole(tmp_path):
    write_whole(tmp_path / "result.json", "old")
    write_whole(tmp_path / "result.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    "training", [5, {}, {"steps": "x", "score": 1.0}, {"steps": True, "score": 1}, {"steps": 1, "score": 1.0, "a": 0}]
)
def test_a_result_edited_by_hand_is_one_line(tmp_path, training):
    assert training_result(Result, tmp_path, {"training": {"steps": 3, "score": 1}}) == Result(3, 1)
    with pytest.raises(UserError, match=rf"{tmp_path}/result.json is damaged under 'training': move {tmp_path} away"):
        training_result(Result, tmp_path, {"training": training})


def test_a_run_folder_continues_the_same_run_and_keeps_others_aside(tmp_path):
    said = []
    folder = tmp_path / "run"
    first = resolve(RunSettings(max_tokens=1000))
    claim_run_folder(folder, first, "data")
    write_result(folder, read_result(folder) | {"training": {"steps": 3}})
    assert claim_run_folder(folder, first, "data")["training"] == {"steps": 3}
    assert said == []
    assert "training" not in claim_run_folder(folder, first, "other data", said.append)
    assert read_result(tmp_path / "run~old")["training"] == {"steps": 3}
    assert said == [f"{folder} holds a run with other settings or data: kept as run~old"]
    second = resolve(RunSettings(max_tokens=2000))
    assert "training" not in claim_run_folder(folder, second, "other data", said.append)
    assert "max_tokens: 2000" in (folder / "config.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run~old", "run~old2"]
    assert read_result(tmp_path / "run~old")["training"] == {"steps": 3}


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("hours of work")
    with pytest.raises(UserError, match="holds other files: choose an empty or new folder"):
        claim_run_folder(tmp_path, resolve(RunSettings()), "data")
    assert list(tmp_path.iterdir()) == [thesis]


def test_the_rest_of_a_run_that_never_began_is_no_other_file(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "error.txt").write_text("no space left")
    (folder / "result.json.incomplete").write_text("{")
    claim_run_folder(folder, resolve(RunSettings()), "data", pytest.fail)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "error.txt", "result.json"]
