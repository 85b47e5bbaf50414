"""The forward of one layer against a cumulative sum of outer products: the same as `newllm bench reading`."""

import sys

from newllm.cli import main

sys.exit(main(["bench", "reading", *sys.argv[1:]]))
