"""Training speed and peak memory against Hugging Face's GPT-NeoX: the same as `newllm bench train`."""

import sys

from newllm.cli import main

sys.exit(main(["bench", "train", *sys.argv[1:]]))
