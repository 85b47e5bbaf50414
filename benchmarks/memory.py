"""Peak memory and cache bytes per token while decoding: the same as `newllm bench memory`."""

import sys

from newllm.cli import main

sys.exit(main(["bench", "memory", *sys.argv[1:]]))
