"""A folder is one process's at a time, and nobody waits for a process that is no more."""

import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from newllm.errors import UserError
from newllm.training import locks
from newllm.training.locks import create_lock, lock


def test_a_second_process_is_kept_out_and_a_dead_one_is_not_waited_for(tmp_path):
    parent = psutil.Process(os.getppid())
    path = tmp_path / "run.newllm-lock"
    path.write_text(json.dumps({"pid": parent.pid, "started": parent.create_time()}))
    with pytest.raises(UserError, match=f"process {parent.pid}"), lock(tmp_path / "run"):
        pass
    path.write_text(json.dumps({"pid": parent.pid, "started": parent.create_time() + 2}))  # the clock was set
    with pytest.raises(UserError, match=f"process {parent.pid}"), lock(tmp_path / "run"):
        pass
    path.write_text(json.dumps({"pid": parent.pid, "started": parent.create_time() - 60}))  # the id was used again
    with lock(tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with lock(tmp_path / "run"):  # the process that has it may enter again
            pass
        assert path.exists()
    assert not path.exists()


def test_of_many_that_take_a_lock_at_once_one_gets_it(tmp_path):
    (tmp_path / "run.newllm-lock").write_text("")  # its process was killed between making and writing it
    os.utime(tmp_path / "run.newllm-lock", (0, 0))
    with lock(tmp_path / "run"):
        (tmp_path / "run.newllm-lock").unlink()
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(create_lock, [tmp_path / "run.newllm-lock"] * 8))
    assert sorted(made) == [False] * 7 + [True]


def lock_of_parent():
    parent = psutil.Process(os.getppid())
    return json.dumps({"pid": parent.pid, "started": parent.create_time()})


def test_of_two_that_find_an_abandoned_lock_the_slower_one_leaves_that_of_the_other(tmp_path, monkeypatch):
    path = tmp_path / "run.newllm-lock"
    path.write_text(json.dumps({"pid": os.getppid(), "started": 0.0}))
    is_running = locks.is_running

    def is_running_slowly(**holder):
        found = is_running(**holder)
        if not found:  # meanwhile another one removes the abandoned lock, and makes its own
            path.write_text(lock_of_parent())
        return found

    monkeypatch.setattr(locks, "is_running", is_running_slowly)
    with pytest.raises(UserError, match=f"process {os.getppid()}"), lock(tmp_path / "run"):
        pass
    assert path.read_text() == lock_of_parent()
    assert [path] == list(tmp_path.iterdir())


def test_a_lock_that_is_being_made_is_not_taken_for_an_abandoned_one(tmp_path):
    path = tmp_path / "run.newllm-lock"
    path.write_text("")
    writing = threading.Timer(0.5, path.write_text, [lock_of_parent()])
    writing.start()
    with pytest.raises(UserError, match=f"process {os.getppid()}"), lock(tmp_path / "run"):
        pass
    writing.join()


def test_a_zombie_holds_no_lock(tmp_path):
    ended = subprocess.Popen(["true"])
    process = psutil.Process(ended.pid)
    (tmp_path / "run.newllm-lock").write_text(json.dumps({"pid": ended.pid, "started": process.create_time()}))
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run.newllm-lock").read_text())["pid"] == os.getpid()
    ended.wait()


@pytest.mark.parametrize("content", ["[1, 2]", '{"pid": 1}', '{"version": 7}', "my notes", "{", b"\xff"])
def test_a_file_of_somebody_else_is_told_and_kept(tmp_path, content):
    path = tmp_path / "run.newllm-lock"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(UserError, match="newllm-lock is no lock of newllm, whose"), lock(tmp_path / "run"):
        pass
    assert path.read_bytes() == before


def test_other_locks_beside_the_folder_are_nobodys_business(tmp_path):
    own = tmp_path / "flake.lock"
    own.write_text("{}")
    with lock(tmp_path / "flake"):
        pass
    assert own.read_text() == "{}"


def test_a_name_without_room_for_a_lock_is_one_line(tmp_path):
    with pytest.raises(UserError, match="the name is too long"), lock(tmp_path / ("a" * 250)):
        pass
