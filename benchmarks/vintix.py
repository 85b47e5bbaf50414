"""A step of the Vintix engine against reading the context again: the same as `newllm bench vintix`."""

import sys

from newllm.cli import main

sys.exit(main(["bench", "vintix", *sys.argv[1:]]))
