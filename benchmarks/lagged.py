"""Lagged Cache Training against training step by step: the same as `newllm bench lagged`."""

import sys

from newllm.cli import main

sys.exit(main(["bench", "lagged", *sys.argv[1:]]))
