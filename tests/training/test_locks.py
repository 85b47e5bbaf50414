"""A folder is one process's at a time, and nobody waits for a process that is no more."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from newllm.settings import UserError
from newllm.training.locks import create_lock, lock


def test_a_second_process_is_kept_out_and_a_dead_one_is_not_waited_for(tmp_path):
    parent = psutil.Process(os.getppid())
    path = tmp_path / "run.lock"
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
    (tmp_path / "run.lock").write_text("")  # its process was killed between making and writing it
    with lock(tmp_path / "run"):
        (tmp_path / "run.lock").unlink()
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(create_lock, [tmp_path / "run.lock"] * 8))
    assert sorted(made) == [False] * 7 + [True]


def test_a_zombie_holds_no_lock(tmp_path):
    ended = subprocess.Popen(["true"])
    process = psutil.Process(ended.pid)
    (tmp_path / "run.lock").write_text(json.dumps({"pid": ended.pid, "started": process.create_time()}))
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    ended.wait()
