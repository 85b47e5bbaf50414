"""A training that never ends, for the tests of the processes that train. Imports no torch: each of them is a new one.

As a program: starts such a process, which writes its id into the file that is named, and waits for it.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from newllm.commands import vintix as commands


def train(file):
    commands._train = wait
    return commands._train_in_process(None, [], file)


def wait(run, data, file):
    file.write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, commands._begin_process, (spawn.Event(),)) as pool:
        pool.submit(train, Path(sys.argv[1])).result()
